//! Whether another agent comes, asked of an API server as it is while a chart is upgraded, removed, or its rights are broken.

use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use culvert_runtime::tasks::Tasks;
use serde_json::{Value, json};

use super::KubernetesConfig;
use super::fake_api::{Asked, FakeApi, list, refusal};
use super::leave::is_for_good;
use super::presence::{Presence, Watched};

const SETS: &str = "/apis/apps/v1/namespaces/culvert-system/daemonsets";
const SET: &str = "/apis/apps/v1/namespaces/culvert-system/daemonsets/culvert-agent";
const NAMESPACE: &str = "/api/v1/namespaces/culvert-system";
const NODE: &str = "/api/v1/nodes/n";

/// Shorter than any wait for something that does not come.
const AT_ONCE: Duration = Duration::from_secs(5);

fn set(selector: &Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "culvert-agent", "namespace": "culvert-system", "resourceVersion": "1"},
        "spec": {"selector": {}, "template": {"spec": {"containers": [], "nodeSelector": selector}}}})
}

fn object(deleted: bool) -> (u16, Value) {
    let at = deleted.then_some("2026-01-01T00:00:00Z");
    (200, json!({"metadata": {"name": "x", "labels": {"os": "linux"}, "deletionTimestamp": at}}))
}

fn config(account: &Path) -> KubernetesConfig {
    let claims = URL_SAFE_NO_PAD.encode(r#"{"exp":99999999999}"#);
    fs::write(account.join("token"), format!("e30.{claims}.x")).unwrap();
    KubernetesConfig { account_dir: account.to_owned(), ..KubernetesConfig::default() }
}

/// What an agent makes of answers, without having watched anything.
async fn asked(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> bool {
    let account = tempfile::tempdir().unwrap();
    let api = FakeApi::start(move |asked: &Asked| answer(&asked.path)).await;
    let nothing = Presence::default();
    let config = config(account.path());
    let answer = is_for_good(&api.client, &config, "n", &nothing);
    tokio::time::timeout(AT_ONCE, answer).await.expect("it is clear at once")
}

/// C79.
#[tokio::test]
async fn an_agent_that_is_replaced_leaves_everything() {
    let present = |selector: Value| {
        move |path: &str| match path {
            SET => (200, set(&selector)),
            NODE => object(false),
            _ => refusal(403),
        }
    };
    assert!(!asked(present(json!({}))).await);
    assert!(!asked(present(json!({"os": "linux"}))).await);
    // The node's labels cannot be read.
    assert!(
        !asked(|path| if path == SET { (200, set(&json!({"os": "other"}))) } else { refusal(403) }).await
    );
}

/// C79.
#[tokio::test]
async fn an_agent_whose_daemonset_goes_or_goes_elsewhere_takes_everything_away() {
    assert!(asked(|_| refusal(404)).await);
    let deleted = |path: &str| {
        let mut it = set(&json!({}));
        it["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        if path == SET { (200, it) } else { refusal(403) }
    };
    assert!(asked(deleted).await);
    let elsewhere = |path: &str| match path {
        SET => (200, set(&json!({"mesh": "yes"}))),
        NODE => object(false),
        _ => refusal(403),
    };
    assert!(asked(elsewhere).await);
}

/// C79: `kubectl delete namespace` takes rights and DaemonSet in any order.
#[tokio::test]
async fn an_agent_whose_namespace_goes_takes_everything_away() {
    assert!(asked(|path| if path == NAMESPACE { object(true) } else { refusal(403) }).await);
    assert!(asked(|path| if path == NAMESPACE { refusal(404) } else { refusal(403) }).await);
}

/// C79: the account is the last to go, and the token of an account that is gone is refused.
#[tokio::test]
async fn an_agent_whose_account_is_gone_takes_everything_away() {
    assert!(asked(|_| refusal(401)).await);
}

/// C79: as `helm uninstall` goes about it: the DaemonSet goes, then the rights, then kubelet ends the agent.
#[tokio::test]
async fn an_agent_that_saw_its_daemonset_go_needs_no_right_to_know_it() {
    let account = tempfile::tempdir().unwrap();
    let config = config(account.path());
    let api = FakeApi::start(|asked: &Asked| match asked.path.as_str() {
        SETS => list(&[set(&json!({}))]),
        _ => refusal(403),
    })
    .await;
    let tasks = Tasks::new("test");
    let presence = Presence::watch(&api.client, &config, &tasks);
    let until = async |watched: Watched| {
        while presence.watched() != watched {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(AT_ONCE, until(Watched::There)).await.unwrap();
    tokio::time::timeout(AT_ONCE, api.until(Asked::is_watch)).await.unwrap();
    api.show(SETS, "DELETED", &set(&json!({})));
    tokio::time::timeout(AT_ONCE, until(Watched::Gone)).await.unwrap();
    let answer = is_for_good(&api.client, &config, "n", &presence);
    assert!(tokio::time::timeout(AT_ONCE, answer).await.expect("it is clear at once"));
    tasks.abort_all();
}

/// C79: with the DaemonSet watched and there, a right that is missing is no removal, however often it is asked about.
#[tokio::test]
async fn an_agent_that_lost_a_right_by_mistake_leaves_everything() {
    let account = tempfile::tempdir().unwrap();
    let config = config(account.path());
    let api = FakeApi::start(|asked: &Asked| match asked.path.as_str() {
        SETS => list(&[set(&json!({}))]),
        NAMESPACE => object(false),
        _ => refusal(403),
    })
    .await;
    let tasks = Tasks::new("test");
    let presence = Presence::watch(&api.client, &config, &tasks);
    let questions = || api.asked().iter().filter(|it| it.path == SET).count();
    let answer = is_for_good(&api.client, &config, "n", &presence);
    tokio::pin!(answer);
    // Not for all of the time that it has, which another test adds up.
    let watching = async {
        while questions() < 3 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        answer = &mut answer => panic!("it was clear at once: {answer}"),
        () = watching => {}
    }
    tasks.abort_all();
}
