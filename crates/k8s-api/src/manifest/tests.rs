use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::object::Kind;

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    image: i\n    unknown: {x: 1}\n";

fn policy(name: &str, port: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: n\nspec:\n  action: DENY\n  rules:\n  - to:\n    - operation:\n        ports: [\"{port}\"]\n"
    )
}

fn errors(text: &str) -> Vec<String> {
    parse_file("f.yaml", text).errors.iter().map(ToString::to_string).collect()
}

fn texts(files: &[(&str, &str)]) -> Scan {
    let files = files.iter().map(|(name, text)| ((*name).to_owned(), ScannedFile::Text((*text).to_owned())));
    Scan { files: files.collect() }
}

fn keys(loaded: &Loaded) -> Vec<String> {
    loaded.objects.iter().map(|manifest| manifest.object.key().to_string()).collect()
}

#[test]
fn core_kinds_ignore_what_they_do_not_know_and_get_a_namespace() {
    let parsed = parse_file("f.yaml", POD);
    assert_eq!(parsed.errors, []);
    assert_eq!(parsed.objects[0].object.key().to_string(), "Pod default/a");
    let null = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: n\n  creationTimestamp: null\n  labels:\nspec:\n";
    assert_eq!(errors(null), [""; 0]);
}

#[test]
fn mesh_kinds_name_file_line_field_value_and_what_was_expected() {
    assert_eq!(
        errors(&policy("p", "99999")),
        [
            "f.yaml:11: spec.rules[0].to[0].operation.ports[0]: invalid value (got \"99999\", expected a port from 1 to 65535)"
        ]
    );
    let text = policy("p", "80").replace("ports", "port");
    let all = errors(&text);
    assert!(
        all[0].starts_with("f.yaml:11: spec.rules[0].to[0].operation.port: unknown field (expected one of"),
        "{all:?}"
    );
    let all = errors(&policy("p", "80").replace("DENY", "Deny"));
    assert_eq!(
        all,
        ["f.yaml:7: spec.action: unknown value (got \"Deny\", expected one of ALLOW, DENY, AUDIT, CUSTOM)"]
    );
    let all = errors(&policy("p", "80").replace("spec:", "specs:"));
    assert_eq!(all, ["f.yaml:6: specs: unknown field (expected metadata or spec)"]);
}

#[test]
fn every_wrong_value_of_a_policy_is_found_in_one_look() {
    let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n  rules:\n  - from:\n    - source:\n        principals: [\"spiffe://x\", \"a*b\", \"*\", \"x/*\"]\n    when:\n    - key: source.ip\n      values: [10.0.0.0/33]\n    - key: destination.port\n      values: [\"0\"]\n    - key: source.nothing\n      values: [x]\n    - key: source.namespace\n";
    let lines: Vec<(u32, String)> =
        parse_file("f", text).errors.into_iter().map(|error| (error.line, error.field)).collect();
    let expected = [
        (8, "spec.rules[0].from[0].source.principals[0]"),
        (8, "spec.rules[0].from[0].source.principals[1]"),
        (11, "spec.rules[0].when[0].values[0]"),
        (13, "spec.rules[0].when[1].values[0]"),
        (14, "spec.rules[0].when[2].key"),
        (16, "spec.rules[0].when[3]"),
    ];
    assert_eq!(lines, expected.map(|(line, field)| (line, field.to_owned())));
}

#[test]
fn a_forgotten_list_is_not_anything_at_all() {
    for part in ["principals:", "principals: []"] {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec:\n  rules:\n  - from:\n    - source:\n        {part}\n"
        );
        let all = errors(&text);
        assert!(all[0].starts_with("f.yaml:8: spec.rules[0].from[0].source.principals: "), "{all:?}");
    }
}

#[test]
fn what_is_required_and_what_is_unknown() {
    let cases = [
        ("kind: Pod\n", "f.yaml:1: apiVersion: is required (expected text, as in every Kubernetes manifest)"),
        ("- a\n", "f.yaml:1: is not a map (expected a Kubernetes manifest)"),
        ("apiVersion: v1\nkind: Namespace\n", "f.yaml:1: metadata.name: is required (expected a name)"),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: A_b\n",
            "f.yaml:4: metadata.name: invalid name (got \"A_b\", expected lower case letters, digits and -, beginning and ending with a letter or digit)",
        ),
        (
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n",
            "f.yaml:2: kind: this kind makes pods, and only Kubernetes runs it (got \"Deployment\", expected Pod, where manifests come from a directory)",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: d}\n",
            "f.yaml:2: kind: security.istio.io has no kind of this name that the mesh enforces (got \"RequestAuthentication\", expected AuthorizationPolicy, PeerAuthentication, ServiceEntry or WorkloadEntry)",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - name: c\n    env:\n    - name: X\n      value: 1\n",
            "f.yaml:9: spec.containers[0].env[0].value: wrong type: it is not a string; quote it if it is meant as one (got \"1\", expected a string)",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(text), [expected], "{text}");
    }
    let parsed = parse_file(
        "f",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n---\napiVersion: x.io/v1\nkind: Y\n",
    );
    assert_eq!(parsed.errors, []);
    assert_eq!(parsed.notes.len(), 2);
}

#[test]
fn peer_authentication_and_entries() {
    let bad = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec:\n  mtls: {mode: STRICT}\n  portLevelMtls:\n    http: {mode: PERMISSIVE}\n";
    let fields: Vec<String> = parse_file("f", bad).errors.into_iter().map(|error| error.field).collect();
    assert_eq!(fields, ["spec.portLevelMtls", "spec.portLevelMtls.http"]);
    let unquoted = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec:\n  selector:\n    matchLabels: {app: a}\n  portLevelMtls:\n    8080: {mode: PERMISSIVE}\n";
    assert_eq!(errors(unquoted), [""; 0]);
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: p}\nspec:\n  hosts: [\"*\"]\n  resolution: STATIC\n  ports:\n  - {number: 80, name: a}\n  - {number: 80, name: a}\n  endpoints:\n  - address: example.com\n    ports: {b: 1}\n";
    let fields: Vec<String> = parse_file("f", entry).errors.into_iter().map(|error| error.field).collect();
    assert_eq!(
        fields,
        [
            "spec.hosts[0]",
            "spec.endpoints[0].address",
            "spec.endpoints[0].ports.b",
            "spec.ports[1].number",
            "spec.ports[1].name"
        ]
    );
}

#[test]
fn lists_are_taken_apart_and_duplicates_in_a_file_refused() {
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n";
    assert_eq!(errors(list), ["f.yaml:9: metadata.name: Namespace a is already in this file (got \"a\")"]);
}

#[test]
fn a_file_that_turns_bad_keeps_its_last_good_objects() {
    let mut state = LastGood::default();
    let (good, bad, other) = (policy("p", "80"), policy("p", "0"), policy("q", "81"));
    assert!(state.apply(texts(&[("a.yaml", &good), ("b.yaml", &other)])));
    assert!(!state.apply(texts(&[("a.yaml", &good), ("b.yaml", &other)])));
    let before = state.loaded();
    assert_eq!(keys(&before), ["AuthorizationPolicy n/p", "AuthorizationPolicy n/q"]);

    assert!(state.apply(texts(&[("a.yaml", &bad), ("b.yaml", &other)])));
    assert_eq!(state.loaded().objects, before.objects);
    assert_eq!(state.errors().count(), 1);
    assert_eq!(state.errors().next().unwrap().line, 11);

    // Half of a file being good does not put that half in force.
    let half = format!("{}---\n{bad}", policy("new", "1"));
    state.apply(texts(&[("a.yaml", &half), ("b.yaml", &other)]));
    assert_eq!(state.loaded().objects, before.objects);

    let mended = policy("p", "82");
    assert!(state.apply(texts(&[("a.yaml", &mended), ("b.yaml", &other)])));
    assert_eq!(state.errors().count(), 0);
    assert_ne!(state.loaded().objects, before.objects);

    assert!(state.apply(texts(&[("b.yaml", &other)])));
    assert_eq!(keys(&state.loaded()), ["AuthorizationPolicy n/q"]);
}

#[test]
fn a_bad_file_at_the_start_gives_nothing_and_the_rest_is_served() {
    let mut state = LastGood::default();
    state.apply(texts(&[("a.yaml", &policy("p", "0")), ("b.yaml", POD)]));
    assert_eq!(keys(&state.loaded()), ["Pod default/a"]);
    assert_eq!(state.errors().count(), 1);
}

#[test]
fn an_object_stays_with_the_file_that_had_it() {
    let mut state = LastGood::default();
    let (first, second) = (policy("p", "80"), policy("p", "90"));
    state.apply(texts(&[("b.yaml", &first)]));
    state.apply(texts(&[("a.yaml", &second), ("b.yaml", &first)]));
    assert_eq!(*state.loaded().objects[0].file, *"b.yaml");
    assert_eq!(
        state.errors().next().unwrap().to_string(),
        "a.yaml:1: metadata.name: AuthorizationPolicy n/p is already in b.yaml:1, which stays in force (got \"p\")"
    );
    // Moving it: the old place goes, the new one takes over without being touched again.
    state.apply(texts(&[("a.yaml", &second)]));
    assert_eq!(*state.loaded().objects[0].file, *"a.yaml");
    assert_eq!(state.errors().count(), 0);
}

#[test]
fn a_directory_is_read_in_order_within_its_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("sub/z.yml"), policy("z", "1")).unwrap();
    fs::write(at("b.json"), r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"b"}}"#).unwrap();
    fs::write(at("a.yaml"), POD).unwrap();
    fs::write(at("readme.md"), "no").unwrap();
    fs::write(at(".hidden.yaml"), "no").unwrap();
    fs::write(at("big.yaml"), vec![b'#'; usize::try_from(scan::MAX_FILE_BYTES).unwrap() + 1]).unwrap();
    fs::write(at("latin.yaml"), [0xff, 0xfe]).unwrap();
    symlink("/etc/passwd", at("outside.yaml")).unwrap();
    symlink("a.yaml", at("inside.yaml")).unwrap();
    symlink("missing", at("dangling.yaml")).unwrap();
    symlink(".", at("loop")).unwrap();
    let loaded = load_dir(dir.path()).unwrap();
    assert_eq!(keys(&loaded), ["Pod default/a", "Namespace b", "AuthorizationPolicy n/z"]);
    assert_eq!(loaded.authorization_policies().count(), 1);
    let errors: Vec<String> = loaded.errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        errors,
        [
            "big.yaml: is larger than 4194304 bytes",
            "latin.yaml: is not UTF-8 text",
            "outside.yaml: is a link to a file outside the directory",
            "inside.yaml:1: metadata.name: Pod default/a is already in a.yaml:1, which stays in force (got \"a\")",
        ]
    );
    assert!(matches!(load_dir(&at("nothing")), Err(DirError::Unreadable { .. })));
    assert!(loaded.by_key().keys().any(|key| key.kind == Kind::Namespace));
}

proptest::proptest! {
    /// Whatever a file holds, reading it ends, and a file without errors is one whose objects have names.
    #[test]
    fn any_text_is_read_or_refused(text in "[a-z:\\-\\[\\]{}&* \n\"#|>0-9]{0,200}") {
        let parsed = parse_file("f", &text);
        for manifest in &parsed.objects {
            proptest::prop_assert!(!manifest.object.metadata().name.is_empty());
        }
    }
}
