//! What has to be done so that the pods that should be enrolled are, and no others. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use culvert_net::redirect::RedirectConfig;

/// A pod that should be enrolled.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// The pod's uid: a new one for each incarnation.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// It ends tunnels itself (Z54): only its outbound traffic is the proxy's.
    pub native_tunnel: bool,
    /// Where its network namespace is mounted.
    pub netns: PathBuf,
    /// The rules it should have.
    pub rules: RedirectConfig,
    /// What is wrong with its annotations, for its report.
    pub problem: Option<String>,
}

/// What was done for a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Enrolled {
    /// As it was wanted then.
    pub pod: Desired,
    /// The rules stand.
    pub rules_installed: bool,
    /// The proxy has it.
    pub acknowledged: bool,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write the rules, then tell the proxy, then report (C31).
    Enrol(Desired),
    /// Rules stand, but the proxy has not acknowledged: tell it (again).
    Register(Desired),
    /// The rules are to be compared with what they should be, and mended.
    Verify(Desired),
    /// Take the rules out if the pod goes on outside of the mesh, then tell the proxy, then the report (C32).
    Unenrol {
        /// What was enrolled.
        pod: Desired,
        /// It is known to go on outside. One that is gone, or of which nothing is known any more, keeps its rules.
        stays: bool,
    },
}

/// The actions that lead from `enrolled` to `desired`. `stays` tells of a pod with that uid that it is
/// to be outside.
pub fn plan(
    desired: &[Desired],
    enrolled: &BTreeMap<String, Enrolled>,
    proxy_connected: bool,
    stays: impl Fn(&str) -> bool,
) -> Vec<Action> {
    let wanted: BTreeMap<&str, &Desired> = desired.iter().map(|pod| (pod.uid.as_str(), pod)).collect();
    let leave = enrolled
        .iter()
        .filter(|(uid, _)| !wanted.contains_key(uid.as_str()))
        .map(|(uid, was)| Action::Unenrol { pod: was.pod.clone(), stays: stays(uid) });
    let join = wanted.values().map(|&pod| match enrolled.get(&pod.uid) {
        None => Action::Enrol(pod.clone()),
        Some(was) if was.pod != *pod || !was.rules_installed => Action::Enrol(pod.clone()),
        Some(was) if !was.acknowledged && proxy_connected => Action::Register(pod.clone()),
        Some(_) => Action::Verify(pod.clone()),
    });
    // A pod's address may be another's next: what leaves, leaves first.
    leave.chain(join).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pod(uid: u8, sa: u8) -> Desired {
        Desired {
            uid: format!("u{uid}"),
            name: format!("p{uid}"),
            namespace: "n".into(),
            service_account: format!("sa{sa}"),
            native_tunnel: false,
            netns: format!("/ns/{uid}").into(),
            rules: RedirectConfig::default(),
            problem: None,
        }
    }

    fn apply(actions: Vec<Action>, enrolled: &mut BTreeMap<String, Enrolled>) {
        for action in actions {
            match action {
                Action::Enrol(pod) | Action::Register(pod) => {
                    enrolled
                        .insert(pod.uid.clone(), Enrolled { pod, rules_installed: true, acknowledged: true });
                }
                Action::Unenrol { pod, .. } => {
                    enrolled.remove(&pod.uid);
                }
                Action::Verify(_) => {}
            }
        }
    }

    #[test]
    fn without_a_proxy_nobody_is_registered_again() {
        let pod = pod(1, 1);
        let was = Enrolled { pod: pod.clone(), rules_installed: true, acknowledged: false };
        let enrolled = BTreeMap::from([(pod.uid.clone(), was)]);
        assert_eq!(
            plan(std::slice::from_ref(&pod), &enrolled, false, |_| true),
            [Action::Verify(pod.clone())]
        );
        assert_eq!(plan(std::slice::from_ref(&pod), &enrolled, true, |_| true), [Action::Register(pod)]);
    }

    #[test]
    fn a_dead_pods_rules_are_left_to_die_with_it() {
        let pod = pod(1, 1);
        let was = Enrolled { pod: pod.clone(), rules_installed: true, acknowledged: true };
        let enrolled = BTreeMap::from([(pod.uid.clone(), was)]);
        assert_eq!(plan(&[], &enrolled, true, |_| false), [Action::Unenrol { pod, stays: false }]);
    }

    proptest! {
        /// C24, differently: one pass reaches what is desired, and a second has nothing left to change.
        #[test]
        fn a_pass_converges(
            before in prop::collection::btree_map(0u8..6, (0u8..3, any::<bool>(), any::<bool>()), 0..6),
            after in prop::collection::btree_map(0u8..6, 0u8..3, 0..6),
        ) {
            let mut enrolled: BTreeMap<String, Enrolled> = before
                .into_iter()
                .map(|(uid, (sa, rules_installed, acknowledged))| {
                    (format!("u{uid}"), Enrolled { pod: pod(uid, sa), rules_installed, acknowledged })
                })
                .collect();
            let desired: Vec<_> = after.into_iter().map(|(uid, sa)| pod(uid, sa)).collect();
            apply(plan(&desired, &enrolled, true, |_| true), &mut enrolled);
            let now: Vec<_> = enrolled.values().map(|e| e.pod.clone()).collect();
            prop_assert_eq!(&now, &desired);
            prop_assert!(enrolled.values().all(|e| e.rules_installed && e.acknowledged));
            let rest = plan(&desired, &enrolled, true, |_| true);
            prop_assert!(rest.iter().all(|a| matches!(a, Action::Verify(_))));
        }
    }
}
