//! What the watchers say, taken into one world. Pure: messages in, world out.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use culvert_k8s_api::manifest::{FileError, Manifest};
use culvert_k8s_api::network_policy::OtherNetworkPolicy;
use culvert_k8s_api::status::{PodStatus, RedirectionStatus};
use culvert_k8s_api::{Kind, Object, ObjectKey, ObjectMeta};

use super::convert::{Converted, Refused};
use super::kinds::Watched;
use super::selection::Selection;
use crate::index::World;

/// What a watcher says.
#[derive(Clone, Debug)]
pub enum Said {
    /// The kind is being watched from now on; nothing is served before each such kind was listed once.
    Begun,
    /// The kind is watched in another version from now on, the one that is given no more. What is known of it stays until it is
    /// listed in the new one.
    Replaces(Watched),
    /// A list begins.
    Init,
    /// An object of the list.
    Listed(ObjectKey, Box<Result<Converted, Refused>>),
    /// The list is whole: what it did not have is gone.
    Done,
    /// An object is there, or is another.
    Applied(ObjectKey, Box<Result<Converted, Refused>>),
    /// An object is gone.
    Deleted(ObjectKey),
    /// The kind may not be watched, so nobody knows what it holds.
    Denied,
    /// The kind is not defined any more, and neither is anything of it.
    Gone,
}

/// The world and what is known of each kind.
#[derive(Debug, Default)]
pub struct Store {
    world: World,
    kinds: BTreeMap<Watched, State>,
    /// Every kind that there was at first was listed.
    whole: bool,
    errors: BTreeMap<ObjectKey, Vec<FileError>>,
    selection: Selection,
    /// By namespace: whether it is selected.
    selected: HashMap<String, bool>,
    /// What is in namespaces that are not: it is needed as soon as one is.
    held: HashMap<ObjectKey, Result<Converted, Refused>>,
    /// Of pods in the world: under which key their redirection is.
    redirected: HashMap<(String, String), (String, String)>,
}

type Staged = (ObjectKey, Box<Result<Converted, Refused>>);

#[derive(Debug, Default)]
struct State {
    listed: bool,
    /// A list that is not whole yet. As large as what it replaces.
    staged: Option<Vec<Staged>>,
    keys: HashSet<ObjectKey>,
}

impl Store {
    /// An empty one, that has what is in the namespaces of a selection.
    pub fn new(selection: Selection) -> Self {
        Self { selection, ..Self::default() }
    }

    /// Takes in what a watcher said. True if the world may be another.
    pub fn apply(&mut self, of: &Watched, said: Said) -> bool {
        let state = self.kinds.entry(of.clone()).or_default();
        match said {
            Said::Begun => false,
            Said::Replaces(before) => {
                if let Some(before) = self.kinds.remove(&before) {
                    self.kinds.insert(of.clone(), State { staged: None, ..before });
                }
                false
            }
            Said::Init => {
                state.staged = Some(Vec::new());
                false
            }
            Said::Listed(key, object) => {
                state.staged.get_or_insert_default().push((key, object));
                false
            }
            Said::Done => {
                let staged = state.staged.take().unwrap_or_default();
                state.listed = true;
                let now: HashSet<ObjectKey> = staged.iter().map(|(key, _)| key.clone()).collect();
                let before = std::mem::replace(&mut state.keys, now);
                let gone: Vec<ObjectKey> =
                    before.into_iter().filter(|key| !state.keys.contains(key)).collect();
                gone.iter().for_each(|key| self.remove(key));
                self.unknown(of, false);
                for (key, object) in staged {
                    self.put(key, *object);
                }
                true
            }
            Said::Applied(key, object) => {
                state.keys.insert(key.clone());
                self.put(key, *object);
                true
            }
            Said::Deleted(key) => {
                state.keys.remove(&key);
                self.remove(&key);
                true
            }
            Said::Denied => {
                state.listed = true;
                self.unknown(of, true);
                true
            }
            Said::Gone => {
                let keys = self.kinds.remove(of).map(|state| state.keys).unwrap_or_default();
                keys.iter().for_each(|key| self.remove(key));
                self.unknown(of, false);
                true
            }
        }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, of: &Watched) -> usize {
        self.kinds.get(of).map_or(0, |state| state.keys.len())
    }

    /// Whether no watcher said anything yet.
    pub fn is_new(&self) -> bool {
        self.kinds.is_empty()
    }

    /// The kinds that were not listed once. While there is one, the world is not whole.
    pub fn missing(&self) -> impl Iterator<Item = &Watched> {
        self.kinds.iter().filter(|(_, state)| !state.listed).map(|(kind, _)| kind)
    }

    /// What is, or `None` before every kind was listed. A kind that is defined later keeps nothing back: before it was defined there
    /// was nothing of it either.
    pub fn world(&mut self) -> Option<World> {
        self.whole = self.whole || (!self.is_new() && self.missing().next().is_none());
        if !self.whole {
            return None;
        }
        self.world.errors =
            self.errors.values().flatten().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        Some(self.world.clone())
    }

    fn put(&mut self, key: ObjectKey, object: Result<Converted, Refused>) {
        if !self.is_selected(&key.namespace) {
            self.held.insert(key, object);
            return;
        }
        if key.kind == Kind::Namespace
            && let Ok(converted) = &object
        {
            let labels = &converted.manifest.object.metadata().labels;
            self.select(&key.name, self.selection.has(&key.name, Some(labels)));
        }
        match object {
            Ok(converted) => {
                self.errors.remove(&key);
                let known = self.world.objects.get(&key);
                if known.is_none_or(|known| known.object != converted.manifest.object) {
                    self.world.objects.insert(key.clone(), converted.manifest);
                }
                if key.kind == Kind::Pod {
                    self.put_pod((key.namespace, key.name), converted.pod, converted.redirection);
                }
            }
            Err(refused) => {
                self.errors.insert(key.clone(), refused.errors);
                if let Some(stand_in) = refused.stand_in
                    && !self.world.objects.contains_key(&key)
                {
                    self.world.objects.insert(key, stand_in);
                }
            }
        }
    }

    fn put_pod(
        &mut self,
        name: (String, String),
        status: Option<PodStatus>,
        redirection: Option<RedirectionStatus>,
    ) {
        let at = status.as_ref().map(|status| (status.node_name.clone(), status.uid.clone()));
        if let Some(before) = self.redirected.get(&name)
            && (redirection.is_none() || at.as_ref() != Some(before))
        {
            self.world.redirection.remove(before);
            self.redirected.remove(&name);
        }
        if let (Some(at), Some(redirection)) = (at, redirection)
            && self.world.redirection.get(&at) != Some(&redirection)
        {
            self.world.redirection.insert(at.clone(), redirection);
            self.redirected.insert(name.clone(), at);
        }
        match status {
            Some(status) if self.world.pods.get(&name) == Some(&status) => {}
            Some(status) => drop(self.world.pods.insert(name, status)),
            None => drop(self.world.pods.remove(&name)),
        }
    }

    fn is_selected(&self, namespace: &str) -> bool {
        let known = || self.selected.get(namespace).copied();
        namespace.is_empty()
            || self.selection.is_everything()
            || known().unwrap_or_else(|| self.selection.has(namespace, None))
    }

    /// Takes in what is in a namespace that is selected now, or puts aside what is in one that is not any more.
    fn select(&mut self, namespace: &str, selected: bool) {
        let before = self.is_selected(namespace);
        self.selected.insert(namespace.to_owned(), selected);
        if selected && !before {
            let held = std::mem::take(&mut self.held);
            let (now, later): (HashMap<_, _>, _) =
                held.into_iter().partition(|(key, _)| key.namespace == namespace);
            self.held = later;
            now.into_iter().for_each(|(key, object)| self.put(key, object));
        } else if before && !selected {
            let there = self.world.objects.iter().filter(|(key, _)| key.namespace == namespace);
            let there: Vec<(ObjectKey, Arc<Manifest>)> =
                there.map(|(key, manifest)| (key.clone(), Arc::clone(manifest))).collect();
            for (key, manifest) in there {
                let name = (key.namespace.clone(), key.name.clone());
                let pod = self.world.pods.get(&name).cloned().filter(|_| key.kind == Kind::Pod);
                let at = self.redirected.get(&name).filter(|_| key.kind == Kind::Pod);
                let redirection = at.and_then(|at| self.world.redirection.get(at)).cloned();
                self.remove(&key);
                self.held.insert(key, Ok(Converted { manifest, pod, redirection }));
            }
        }
    }

    fn remove(&mut self, key: &ObjectKey) {
        if key.kind == Kind::Namespace && !self.selection.is_everything() {
            self.select(&key.name, self.selection.has(&key.name, None));
            self.selected.remove(&key.name);
        }
        self.held.remove(key);
        self.world.objects.remove(key);
        self.errors.remove(key);
        if key.kind == Kind::Pod {
            self.put_pod((key.namespace.clone(), key.name.clone()), None, None);
        }
    }

    /// What may not be looked at may hold anything: it stands there as one policy that may select any pod.
    fn unknown(&mut self, of: &Watched, is: bool) {
        if of.is != Kind::OtherNetworkPolicy {
            return;
        }
        let metadata = ObjectMeta { name: "*".to_owned(), ..ObjectMeta::default() };
        let policy = OtherNetworkPolicy { metadata, kind: format!("{} {}", of.api_version(), of.kind) };
        let object = Object::OtherNetworkPolicy(Box::new(policy));
        let key = object.key();
        if is {
            let manifest = Manifest { file: "unreadable".into(), line: 0, object };
            self.world.objects.insert(key, Arc::new(manifest));
        } else {
            self.world.objects.remove(&key);
        }
    }
}
