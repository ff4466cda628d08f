use serde_json::json;

use super::super::overlay;
use super::super::render::tests::{gateway, settings};
use super::*;

/// The API server in small: applies what it is told, and says what it has.
#[derive(Default)]
struct Server {
    objects: BTreeMap<ObjectRef, Value>,
    uids: u64,
}

impl Server {
    fn apply(&mut self, object: &ObjectRef, body: &Map<String, Value>) -> Observed {
        let uid = match self.objects.get(object) {
            Some(there) => there["metadata"]["uid"].clone(),
            None => {
                self.uids += 1;
                format!("o-{}", self.uids).into()
            }
        };
        let mut stored = Value::Object(body.clone());
        stored["metadata"]["uid"] = uid;
        if object.part == Part::Service {
            stored["spec"]["clusterIPs"] = json!(["10.0.0.9"]);
        }
        self.objects.insert(object.clone(), stored.clone());
        Observed::of(&stored)
    }

    fn list(&self, part: Part) -> BTreeMap<ObjectRef, Observed> {
        let of = self.objects.iter().filter(|(object, _)| object.part == part);
        of.map(|(object, it)| (object.clone(), Observed::of(it))).collect()
    }
}

struct World {
    keeper: Keeper,
    server: Server,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let mut keeper = Keeper::new(settings());
        let server = Server::default();
        PARTS.into_iter().for_each(|part| keeper.listed(part, server.list(part)));
        keeper.defaults(BTreeMap::new());
        Self { keeper, server, now: Instant::now() }
    }

    /// Does everything there is to do, and says what.
    fn settle(&mut self) -> Vec<String> {
        let mut done = Vec::new();
        while let Some(todo) = self.keeper.todo(self.now) {
            assert!(done.len() < 50, "it does not end: {done:?}");
            match todo {
                Todo::Apply { gateway, object, body, .. } => {
                    done.push(format!("apply {}", object.part.kind()));
                    let is = self.server.apply(&object, &body);
                    self.keeper.applied(&gateway, object, &body, is);
                }
                Todo::Delete { gateway, object, .. } => {
                    done.push(format!("delete {}", object.part.kind()));
                    self.server.objects.remove(&object);
                    self.keeper.deleted(&gateway, &object);
                }
            }
        }
        done
    }

    fn seen(&mut self, object: &ObjectRef) {
        self.keeper.seen(object.clone(), self.server.objects.get(object).map(Observed::of));
    }

    fn object(&self, part: Part) -> ObjectRef {
        self.server.objects.keys().find(|it| it.part == part).cloned().expect("it is there")
    }

    fn progress(&self) -> Provisioned {
        self.keeper.progress().into_values().next().expect("a Gateway of ours")
    }
}

fn name() -> Name {
    ("shop".to_owned(), "w".to_owned())
}

fn with_map() -> Gateway {
    gateway("", ", infrastructure: {parametersRef: {group: \"\", kind: ConfigMap, name: p}}")
}

fn overlays(pairs: &[(&str, &str)]) -> Option<Result<Overlays, String>> {
    let data = pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
    Some(overlay::read(&data))
}

const ALL: [&str; 3] = ["apply ServiceAccount", "apply Service", "apply Deployment"];

/// D57, D61: nothing before everything is listed, then each object once.
#[test]
fn what_is_wanted_is_made_once() {
    let mut world = World::new();
    world.keeper.listing(Part::Service);
    let it = gateway("", "");
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    assert_eq!(world.settle(), [""; 0], "not every kind is listed");
    assert_eq!(world.progress().progress, Progress::Pending);
    world.keeper.listed(Part::Service, BTreeMap::new());
    assert_eq!(world.settle(), ALL);
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    assert_eq!(world.settle(), [""; 0]);
    let provisioned = world.progress();
    assert_eq!(provisioned.progress, Progress::Done);
    assert_eq!(provisioned.hostname.as_deref(), Some("w.shop.svc.cluster.local"));
    assert_eq!(provisioned.addresses, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
    // Another leader begins with what is there, and writes it once more: it cannot know what was written last.
    let mut next = World { server: world.server, ..World::new() };
    PARTS.into_iter().for_each(|part| next.keeper.listed(part, next.server.list(part)));
    next.keeper.wish(&vec![(&it, Owner::Us)]);
    assert_eq!(next.settle(), ALL);
}

/// D61: what somebody edits or deletes is put back, once for each edit.
#[test]
fn drift_is_repaired() {
    let mut world = World::new();
    let it = gateway("", "");
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    world.settle();
    let deployment = world.object(Part::Deployment);
    let image = "/spec/template/spec/containers/0/image";
    *world.server.objects.get_mut(&deployment).unwrap().pointer_mut(image).unwrap() = json!("other");
    world.seen(&deployment);
    assert_eq!(world.settle(), ["apply Deployment"]);
    assert_eq!(world.server.objects[&deployment].pointer(image).unwrap(), &settings().image);
    // A status is nobody's edit.
    world.server.objects.get_mut(&deployment).unwrap()["status"] = json!({"availableReplicas": 2});
    world.seen(&deployment);
    assert_eq!(world.settle(), [""; 0]);
    assert_eq!(world.progress().available, 2);
    let service = world.object(Part::Service);
    world.server.objects.remove(&service);
    world.seen(&service);
    assert_eq!(world.settle(), ["apply Service"]);
}

/// D60, D65: an overlay brings an autoscaler, and takes it away when it goes.
#[test]
fn an_autoscaler_goes_with_its_overlay() {
    let mut world = World::new();
    let it = with_map();
    let wished = vec![(&it, Owner::Us)];
    world.keeper.wish(&wished);
    assert_eq!(world.settle(), [""; 0], "the ConfigMap was not looked at yet");
    let key = ("shop".to_owned(), "p".to_owned());
    let both = [
        ("horizontalPodAutoscaler", "spec: {maxReplicas: 3}"),
        ("podDisruptionBudget", "spec: {minAvailable: 1}"),
    ];
    world.keeper.map(key.clone(), overlays(&both));
    world.keeper.wish(&wished);
    assert_eq!(world.settle()[3..], ["apply HorizontalPodAutoscaler", "apply PodDisruptionBudget"]);
    world.keeper.map(key.clone(), overlays(&both[1..]));
    world.keeper.wish(&wished);
    assert_eq!(world.settle(), ["delete HorizontalPodAutoscaler"]);
    // A ConfigMap that is bad or gone takes nothing away.
    for (bad, said) in [(overlays(&[("x", "")]), "key \"x\" is none of"), (None, "does not exist")] {
        world.keeper.map(key.clone(), bad);
        world.keeper.wish(&wished);
        assert_eq!(world.settle(), [""; 0]);
        let Progress::Invalid(invalid) = world.progress().progress else { panic!("{:?}", world.progress()) };
        assert_eq!(invalid.reason, "InvalidParameters");
        assert!(invalid.message.contains("ConfigMap p") && invalid.message.contains(said), "{invalid:?}");
    }
}

/// D60: what a class says is laid over first.
#[test]
fn a_class_has_overlays_of_its_own() {
    let mut world = World::new();
    let of_class = overlays(&[("deployment", "spec: {replicas: 2, minReadySeconds: 7}")]).unwrap();
    world.keeper.defaults(BTreeMap::from([("culvert-waypoint".to_owned(), of_class)]));
    world.keeper.map(("shop".to_owned(), "p".to_owned()), overlays(&[("deployment", "spec: {replicas: 3}")]));
    let it = with_map();
    // Only maps that are referred to are kept, so it is told again.
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    world.settle();
    let spec = &world.server.objects[&world.object(Part::Deployment)]["spec"];
    assert_eq!((&spec["replicas"], &spec["minReadySeconds"]), (&json!(3), &json!(7)));
}

/// D61: of whom nothing is known, and who has addresses of his own, nothing is touched; another's class takes all away.
#[test]
fn only_what_is_ours_is_made_and_only_what_is_given_up_is_deleted() {
    let mut world = World::new();
    let own = gateway("", ", addresses: [{value: 10.0.0.1}]");
    world.keeper.wish(&vec![(&own, Owner::Us)]);
    assert_eq!(world.settle(), [""; 0]);
    assert!(world.keeper.progress().is_empty());
    let it = gateway("", "");
    world.keeper.wish(&vec![(&it, Owner::Other)]);
    assert_eq!(world.settle(), [""; 0]);
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    world.settle();
    for kept in [(&own, Owner::Us), (&it, Owner::Unknown)] {
        world.keeper.wish(&vec![kept]);
        assert_eq!(world.settle(), [""; 0], "{:?}", kept.1);
    }
    // A Gateway that is not known: the API server deletes what it owned.
    world.keeper.wish(&Vec::new());
    assert_eq!(world.settle(), [""; 0]);
    // Listeners that cannot be take nothing away either.
    let mut without = it.clone();
    without.spec.listeners.clear();
    world.keeper.wish(&vec![(&without, Owner::Us)]);
    assert_eq!(world.settle(), [""; 0]);
    let mut renamed = it.clone();
    renamed.spec.gateway_class_name = "nobody-knows".to_owned();
    let gone = ["delete ServiceAccount", "delete Service", "delete Deployment"];
    world.keeper.wish(&vec![(&renamed, Owner::Unknown)]);
    assert_eq!(world.settle(), gone);
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    world.settle();
    world.keeper.wish(&vec![(&it, Owner::Other)]);
    assert_eq!(world.settle(), gone);
}

/// D62: under another name everything is made anew, and what had the old one goes.
#[test]
fn another_name_takes_the_old_objects_away() {
    let mut world = World::new();
    let it = gateway("", "");
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    world.settle();
    let renamed = gateway(", annotations: {gateway.istio.io/name-override: v}", "");
    world.keeper.wish(&vec![(&renamed, Owner::Us)]);
    let done = world.settle();
    assert_eq!((&done[..3], done.len()), (&ALL.map(str::to_owned)[..], 6));
    assert!(world.server.objects.keys().all(|it| it.name == "v"), "{:?}", world.server.objects.keys());
}

/// D61.
#[test]
fn what_is_in_the_way_is_left_alone_and_said() {
    let mut world = World::new();
    let (it, mut other) =
        (gateway("", ""), gateway(", annotations: {gateway.istio.io/name-override: w}", ""));
    other.metadata.name = "x".to_owned();
    other.metadata.uid = "u-2".to_owned();
    world.keeper.wish(&vec![(&it, Owner::Us), (&other, Owner::Us)]);
    let Some(Todo::Apply { gateway, object, unseen: true, .. }) = world.keeper.todo(world.now) else {
        panic!()
    };
    assert_eq!(gateway, name());
    let said = |found: Found| world.keeper.in_the_way(&name(), &object, &found);
    let foreign = said(Found::default()).unwrap();
    assert!(
        foreign.contains("ServiceAccount shop/w exists without label gateway.istio.io/managed"),
        "{foreign}"
    );
    let of = |owner: &str| Observed { owner: owner.to_owned(), ..Observed::default() };
    let theirs = said(Found { labelled: true, observed: of("u-2") }).unwrap();
    assert!(theirs.contains("belongs to Gateway shop/x"), "{theirs}");
    assert_eq!(said(Found { labelled: true, observed: of("u-1") }), None);
    assert_eq!(said(Found { labelled: true, observed: of("of-a-gateway-that-is-gone") }), None);
    let going = said(Found { labelled: true, observed: Observed { deleting: true, ..of("u-1") } }).unwrap();
    assert!(going.contains("is being deleted"), "{going}");
}

#[test]
fn a_failure_is_tried_again_later_and_later() {
    let mut world = World::new();
    let it = gateway("", "");
    world.keeper.wish(&vec![(&it, Owner::Us)]);
    let mut waits = Vec::new();
    for _ in 0..7 {
        assert!(world.keeper.todo(world.now).is_some());
        world.keeper.failed(name(), "refused: quota".to_owned(), false, world.now);
        assert_eq!(world.keeper.todo(world.now), None);
        let next = world.keeper.next(world.now).unwrap();
        waits.push((next - world.now).as_secs());
        world.now = next;
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(world.progress().progress, Progress::Failed("refused: quota".to_owned()));
    assert_eq!(world.settle(), ALL);
    assert_eq!(world.progress().progress, Progress::Done);
}
