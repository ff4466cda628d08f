//! The end of the agent: for a restart everything stays as it is; when the mesh is uninstalled, nothing does (C79, C80).
//!
//! What the API server says and what it only does not say are kept apart. A DaemonSet that is gone, being deleted, or has no place on this
//! node any more means that nobody comes after; so does a service account that is gone. A right that is missing means
//! nothing by itself: whoever takes it away by mistake must not open every pod of a node. It is asked again for as long as kubelet
//! waits.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::probes::{self, Kubelet};
use culvert_net::{hold, redirect};
use kube::Client;
use tokio::time::Instant;

use super::attest::Rules;
use super::enrol::Enroller;
use super::presence::{self, Answer, Presence, Watched};
use super::source::{self, Source, View};
use super::{AgentConfig, KubernetesConfig};

/// For the API server to say it. It takes a token for up to 10 s after its account is gone. With the last question, [`GOING`] and what
/// comes after it stays under the 30 s that the chart gives the pod to end.
const ASKING: Duration = Duration::from_secs(14);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);
/// The token must be refused for so long: an API server that starts, or has lost its storage, may refuse good ones for a moment.
const REFUSED: Duration = Duration::from_secs(3);
/// For reports to be taken away and peers to learn of it.
const GOING: Duration = Duration::from_secs(7);
const PASS: Duration = Duration::from_millis(100);
/// For proxies to hear of what was taken from them by force.
const LAST: Duration = Duration::from_secs(1);

/// Whether another agent comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As far as is known. The reason, if it is not known.
    Stay(Option<&'static str>),
    /// No; why.
    Leave(&'static str),
    /// Ask again.
    Again,
}

fn judge(answer: Answer, watched: Watched, refused_for: Duration, asked_for: Duration) -> Verdict {
    match answer {
        Answer::There => Verdict::Stay(None),
        Answer::Deleting => Verdict::Leave("its DaemonSet is being deleted"),
        Answer::NotThere => Verdict::Leave("its DaemonSet is gone"),
        Answer::Elsewhere => Verdict::Leave("its DaemonSet has no place on this node any more"),
        _ if watched == Watched::Gone => Verdict::Leave("its DaemonSet was deleted, and its rights after it"),
        Answer::NoAccount if refused_for >= REFUSED => Verdict::Leave("its service account is gone"),
        _ if asked_for < ASKING => Verdict::Again,
        Answer::NoRight => Verdict::Stay(Some("it may not read its own DaemonSet")),
        Answer::NoAccount | Answer::None => Verdict::Stay(Some("the API server does not answer")),
    }
}

/// Whether no agent comes after this one. Who cannot be asked has not said so.
pub async fn is_for_good(
    client: &Client,
    config: &KubernetesConfig,
    node: &str,
    presence: &Presence,
) -> bool {
    let begun = Instant::now();
    let mut refused = None;
    loop {
        let answer = presence::ask(client, config, node).await;
        let since = (answer == Answer::NoAccount).then(|| *refused.get_or_insert_with(Instant::now));
        refused = since;
        let refused_for = since.map(|it| it.elapsed()).unwrap_or_default();
        match judge(answer, presence.watched(), refused_for, begun.elapsed()) {
            Verdict::Leave(why) => {
                tracing::info!(why, "no agent comes after this one: everything of the mesh leaves the node");
                return true;
            }
            Verdict::Stay(None) => return false,
            Verdict::Stay(Some(why)) => {
                tracing::warn!(why, "whether another agent comes is not known; everything stays");
                return false;
            }
            Verdict::Again => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Un-enrols every pod of the node: first as if its label went, then, if that takes too long, by force. Unlike C80 no pod keeps rules that
/// lead nowhere.
pub async fn release_all<R: Rules>(enroller: &mut Enroller<R>, source: &mut Source) {
    enroller.reports().leaving();
    let until = Instant::now() + GOING;
    while Instant::now() < until {
        let mut view = View { complete: true, ..source.view().unwrap_or_default() };
        view.leave();
        enroller.pass(&view).await;
        if enroller.is_empty() {
            break;
        }
        tokio::time::sleep(PASS).await;
    }
    enroller.abandon(LAST).await;
}

/// Takes the mesh's rules out of every namespace of the node and out of the node's own, whoever put them there: also those that this agent
/// has never heard of, because it could not ask the API server.
pub fn sweep(config: &AgentConfig) {
    let kubernetes = &config.kubernetes;
    let mounted = fs::read_dir(&kubernetes.netns_dir).into_iter().flatten().flatten().map(|it| it.path());
    let shown = source::namespaces(&kubernetes.host_proc).unwrap_or_default();
    let pods: Vec<PathBuf> = mounted.chain(shown).collect();
    for path in pods {
        // What is no namespace, or is gone by now, has no rules.
        let Ok(netns) = NetNs::open(&path) else { continue };
        let removed = match redirect::is_installed(&netns) {
            Ok(true) => redirect::remove(&netns),
            Ok(false) => continue,
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => tracing::info!(namespace = %path.display(), "rules that nobody knew of are removed"),
            Err(error) => tracing::warn!(namespace = %path.display(), %error, "rules cannot be removed"),
        }
    }
    let node = config.node_netns().map_err(|error| error.to_string());
    let cleaned = node.and_then(|node| {
        let nobody = Kubelet { uid: 0, cgroup: None };
        probes::set(&node, nobody, &BTreeSet::new()).map_err(|error| error.to_string())?;
        hold::set(&node, &BTreeSet::new()).map_err(|error| error.to_string())
    });
    if let Err(error) = cleaned {
        tracing::warn!(error, "the node's own rules cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNKNOWN: [Answer; 3] = [Answer::NoRight, Answer::NoAccount, Answer::None];

    /// C79: said is said, whatever was seen before.
    #[test]
    fn what_the_api_server_says_decides() {
        for watched in [Watched::Nothing, Watched::There, Watched::Gone] {
            assert_eq!(judge(Answer::There, watched, Duration::ZERO, Duration::ZERO), Verdict::Stay(None));
            for gone in [Answer::NotThere, Answer::Deleting, Answer::Elsewhere] {
                assert!(
                    matches!(judge(gone, watched, Duration::ZERO, Duration::ZERO), Verdict::Leave(_)),
                    "{gone:?}"
                );
            }
        }
    }

    /// C79: taking a right away, or being out of reach, opens no pod.
    #[test]
    fn a_missing_right_is_asked_about_again_and_then_everything_stays() {
        for watched in [Watched::Nothing, Watched::There] {
            for answer in UNKNOWN {
                assert_eq!(judge(answer, watched, REFUSED / 2, Duration::ZERO), Verdict::Again, "{answer:?}");
            }
            for answer in [Answer::NoRight, Answer::None] {
                assert!(
                    matches!(judge(answer, watched, Duration::ZERO, ASKING), Verdict::Stay(Some(_))),
                    "{answer:?}"
                );
            }
        }
    }

    /// C79: as `helm uninstall` goes about it, the DaemonSet, then the rights, then the account.
    #[test]
    fn rights_that_go_after_the_daemonset_mean_the_end() {
        for answer in UNKNOWN {
            let verdict = judge(answer, Watched::Gone, Duration::ZERO, Duration::ZERO);
            assert!(matches!(verdict, Verdict::Leave(_)), "{answer:?}");
        }
        // Nothing was watched: the account that goes last says it.
        let verdict = judge(Answer::NoAccount, Watched::Nothing, REFUSED, Duration::ZERO);
        assert!(matches!(verdict, Verdict::Leave(_)));
    }

    /// The chart gives the agent 30 s.
    #[test]
    fn the_end_fits_into_the_time_that_kubelet_gives() {
        assert!(ASKING + PAUSE + 2 * presence::PATIENCE + GOING + LAST < Duration::from_secs(30));
    }
}
