use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::Code;

use super::*;

/// Knows some tokens, counts questions, and may be away.
#[derive(Default)]
struct Fake {
    known: Mutex<HashMap<String, Review>>,
    away: Mutex<bool>,
    asked: AtomicUsize,
}

#[tonic::async_trait]
impl Reviewer for Arc<Fake> {
    async fn review(&self, token: &str) -> Result<Review, String> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        if *self.away.lock() {
            return Err("connection refused".to_owned());
        }
        let unknown = || Review { error: "invalid bearer token".to_owned(), ..Review::default() };
        Ok(self.known.lock().get(token).cloned().unwrap_or_else(unknown))
    }
}

fn bound(username: &str) -> Review {
    let claims = [(NODE_CLAIM, "n1"), (POD_CLAIM, "pod-x"), (POD_UID_CLAIM, "u")];
    Review {
        authenticated: true,
        audiences: vec![AUDIENCE.to_owned()],
        username: username.to_owned(),
        extra: claims.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()])).collect(),
        error: String::new(),
    }
}

const PROXY: &str = "system:serviceaccount:culvert-system:ztunnel";

fn reviews(known: &[(&str, Review)]) -> (Arc<Fake>, Arc<TokenReviews<Arc<Fake>>>) {
    let fake = Arc::new(Fake::default());
    fake.known.lock().extend(known.iter().map(|(token, review)| ((*token).to_owned(), review.clone())));
    let reviews = TokenReviews::new(fake.clone(), vec!["culvert-system/ztunnel".parse().unwrap()]);
    (fake, reviews)
}

async fn ask(reviews: &TokenReviews<Arc<Fake>>, token: &str) -> Result<Caller, Status> {
    let mut metadata = MetadataMap::new();
    metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
    reviews.authenticate(&metadata).await
}

/// D49.
#[tokio::test]
async fn the_proxys_account_has_its_node_and_any_other_pod_itself() {
    let (_, reviews) =
        reviews(&[("a.b.c", bound(PROXY)), ("a.b.d", bound("system:serviceaccount:shop:ztunnel"))]);
    let node = NodeName::from("n1");
    assert_eq!(ask(&reviews, "a.b.c").await.unwrap(), Caller::node(node.clone()));
    let (namespace, account, pod) = ("shop".to_owned(), "ztunnel".to_owned(), "pod-x".to_owned());
    let own = Caller { node, grant: Grant::Own { namespace, account, pod } };
    assert_eq!(ask(&reviews, "a.b.d").await.unwrap(), own);
}

/// D15, D50: each refusal says why, for the log.
#[tokio::test]
async fn what_the_api_server_does_not_vouch_for_is_refused() {
    let without = |claim: &str| {
        let mut review = bound(PROXY);
        review.extra.remove(claim);
        review
    };
    let audiences = |audiences: &[&str]| Review {
        audiences: audiences.iter().map(|it| (*it).to_owned()).collect(),
        ..bound(PROXY)
    };
    let (_, reviews) = reviews(&[
        ("a.b.1", audiences(&[])),
        ("a.b.2", audiences(&["https://kubernetes.default.svc"])),
        ("a.b.3", bound("system:node:n1")),
        ("a.b.4", without(NODE_CLAIM)),
        ("a.b.5", without(POD_CLAIM)),
        ("a.b.6", without(POD_UID_CLAIM)),
        ("a.b.7", Review { authenticated: false, ..bound(PROXY) }),
    ]);
    for (token, why) in [
        ("a.b.0", "does not vouch for the token: invalid bearer token"),
        ("a.b.1", "not for the audience istio-ca"),
        ("a.b.2", "not for the audience istio-ca"),
        ("a.b.3", "\"system:node:n1\" is no service account"),
        ("a.b.4", "culvert-system/ztunnel is bound to no pod"),
        ("a.b.5", "bound to no pod"),
        ("a.b.6", "bound to no pod"),
        ("a.b.7", "does not vouch"),
    ] {
        let status = ask(&reviews, token).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{token}");
        assert!(status.message().contains(why), "{token}: {}", status.message());
    }
}

#[tokio::test]
async fn what_is_no_token_is_not_even_asked_for() {
    let (fake, reviews) = reviews(&[]);
    for token in ["", "x", "a.b", "a..c", "a.b.c.d", &format!("a.b.{}", "c".repeat(9000))] {
        assert_eq!(ask(&reviews, token).await.unwrap_err().code(), Code::Unauthenticated, "{token}");
    }
    assert_eq!(fake.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_good_answer_counts_for_a_while_and_a_bad_one_never() {
    let (fake, reviews) = reviews(&[("a.b.c", bound(PROXY))]);
    let asked = || fake.asked.load(Ordering::SeqCst);
    for _ in 0..3 {
        ask(&reviews, "a.b.c").await.unwrap();
    }
    assert_eq!(asked(), 1);
    // The pod is deleted: the API server no longer vouches for its token.
    fake.known.lock().clear();
    ask(&reviews, "a.b.c").await.unwrap();
    tokio::time::advance(REMEMBER).await;
    for _ in 0..2 {
        ask(&reviews, "a.b.c").await.unwrap_err();
    }
    assert_eq!(asked(), 3);
    // A refusal is forgotten at once: a new pod's token may be a moment ahead of the API server that is asked.
    fake.known.lock().insert("a.b.c".to_owned(), bound(PROXY));
    ask(&reviews, "a.b.c").await.unwrap();
}

#[tokio::test]
async fn many_calls_at_once_are_one_question() {
    let (fake, reviews) = reviews(&[("a.b.c", bound(PROXY))]);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let reviews = reviews.clone();
        calls.spawn(async move { ask(&reviews, "a.b.c").await.unwrap() });
    }
    calls.join_all().await;
    assert!(fake.asked.load(Ordering::SeqCst) <= CONCURRENT);
}

/// Nobody gets in because the API server is away, and nobody is told that its token is bad.
#[tokio::test]
async fn no_answer_is_no_yes_and_no_no() {
    let (fake, reviews) = reviews(&[("a.b.c", bound(PROXY))]);
    *fake.away.lock() = true;
    assert_eq!(ask(&reviews, "a.b.c").await.unwrap_err().code(), Code::Unavailable);
    *fake.away.lock() = false;
    ask(&reviews, "a.b.c").await.unwrap();
}

#[test]
fn a_trusted_proxy_is_a_namespace_and_an_account() {
    let parse = |text: &str| text.parse::<TrustedProxy>().map(|it| it.to_string());
    assert_eq!(parse("a/b"), Ok("a/b".to_owned()));
    for bad in ["", "a", "/b", "a/", "a/b/c", "A/b"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}
