//! Whose token a call carries, asked of the API server (TokenReview).
//!
//! A token is good if the API server vouches for it *for our audience*, it is bound to a pod that still exists, and it says on
//! which node that pod is: those claims are the API server's, not the caller's (D15, D50). The proxy's service account may
//! ask for whatever runs on its node (D49); any other pod for its own identity.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::{Api, PostParams};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::auth::{Caller, Grant, NodeName};
use crate::ca::NodeAuthenticator;
use crate::serve::authenticate::bearer;

/// The audience our tokens are for (ambient's).
pub const AUDIENCE: &str = "istio-ca";
/// How long an answer counts. A proxy that starts asks for some hundred certificates at once; a pod that is deleted loses
/// what its token was good for after this long at the latest.
const REMEMBER: Duration = Duration::from_secs(10);
/// Answers that are remembered: two callers on each of 5,000 nodes, at about 300 bytes each 3 MB.
const MAX_REMEMBERED: usize = 10_000;
/// Reviews at the same time. One takes the API server a few milliseconds.
const CONCURRENT: usize = 16;
/// From the question to the answer, waiting for a place included.
const PATIENCE: Duration = Duration::from_secs(5);
/// A bound token has about 1 KiB.
const MAX_TOKEN: usize = 8 * 1024;
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";
/// Claims of a bound token, as the API server repeats them.
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
const POD_CLAIM: &str = "authentication.kubernetes.io/pod-name";
const POD_UID_CLAIM: &str = "authentication.kubernetes.io/pod-uid";

/// What the API server says of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Review {
    /// Whether it vouches for it.
    pub authenticated: bool,
    /// Of those that were asked for, which the token is for.
    pub audiences: Vec<String>,
    /// Such as `system:serviceaccount:NAMESPACE:NAME`.
    pub username: String,
    /// Further claims.
    pub extra: HashMap<String, Vec<String>>,
    /// Why not.
    pub error: String,
}

/// Asks what a token is worth for [`AUDIENCE`].
#[tonic::async_trait]
pub trait Reviewer: Send + Sync + 'static {
    /// # Errors
    /// In words, if there is no answer; never because of the token.
    async fn review(&self, token: &str) -> Result<Review, String>;
}

/// A service account whose pods are proxies: they may ask for every identity on their node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrustedProxy {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub account: String,
}

/// Authenticates calls by [`Reviewer`], and remembers what was good for 10 s.
pub struct TokenReviews<R> {
    reviewer: R,
    trusted: Vec<TrustedProxy>,
    places: Semaphore,
    good: Mutex<HashMap<[u8; 32], Remembered>>,
}

/// Why a token is no good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Unfit {
    #[error("the token is not one of Kubernetes: it is too long, or not three parts")]
    Shape,
    #[error("the API server does not vouch for the token: {0}")]
    Refused(String),
    #[error("the token is not for the audience {AUDIENCE}")]
    Audience,
    #[error("{0:?} is no service account")]
    Account(String),
    #[error("the token of {account} is bound to no pod: it has no claim {claim}")]
    Unbound { account: String, claim: &'static str },
}

struct Remembered {
    caller: Caller,
    until: Instant,
}

#[tonic::async_trait]
impl Reviewer for kube::Client {
    async fn review(&self, token: &str) -> Result<Review, String> {
        let asked = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![AUDIENCE.into()]) },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.clone());
        let answer = api.create(&PostParams::default(), &asked).await.map_err(|error| error.to_string())?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.unwrap_or_default();
        Ok(Review {
            authenticated: status.authenticated.unwrap_or(false),
            audiences: status.audiences.unwrap_or_default(),
            username: user.username.unwrap_or_default(),
            extra: user.extra.unwrap_or_default().into_iter().collect(),
            error: status.error.unwrap_or_default(),
        })
    }
}

impl std::str::FromStr for TrustedProxy {
    type Err = String;

    /// `NAMESPACE/NAME`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, account))
                if culvert_k8s_api::values::is_dns_label(namespace)
                    && culvert_k8s_api::values::is_dns_subdomain(account) =>
            {
                Ok(Self { namespace: namespace.to_owned(), account: account.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/SERVICEACCOUNT")),
        }
    }
}

impl fmt::Display for TrustedProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.account)
    }
}

impl<R: Reviewer> TokenReviews<R> {
    /// Reviews by `reviewer`; the pods of `trusted` may ask for others' identities.
    pub fn new(reviewer: R, trusted: Vec<TrustedProxy>) -> Arc<Self> {
        let places = Semaphore::new(CONCURRENT);
        Arc::new(Self { reviewer, trusted, places, good: Mutex::default() })
    }

    async fn caller(&self, token: &str) -> Result<Caller, Status> {
        let shaped =
            token.len() <= MAX_TOKEN && token.split('.').filter(|part| !part.is_empty()).count() == 3;
        if !shaped {
            return Err(unfit(&Unfit::Shape));
        }
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(caller) = self.remembered(&hash) {
            return Ok(caller);
        }
        let asked = async {
            let _place = self.places.acquire().await.expect("the semaphore is never closed");
            // Of a proxy's many calls at once, the first one's answer is for all.
            if let Some(caller) = self.remembered(&hash) {
                return Ok(caller);
            }
            let review = self.reviewer.review(token).await.map_err(|reason| {
                Status::unavailable(format!("the token could not be reviewed: {reason}"))
            })?;
            let caller = self.judge(review).map_err(|reason| unfit(&reason))?;
            self.remember(hash, caller.clone());
            Ok(caller)
        };
        let late = || Status::unavailable(format!("the token was not reviewed within {PATIENCE:?}"));
        timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(late()))
    }

    fn judge(&self, review: Review) -> Result<Caller, Unfit> {
        if !review.authenticated {
            return Err(Unfit::Refused(clip(&review.error)));
        }
        // An API server that does not know audiences answers with none: that is no yes.
        if !review.audiences.iter().any(|audience| audience == AUDIENCE) {
            return Err(Unfit::Audience);
        }
        let account = review.username.strip_prefix(ACCOUNT_PREFIX).and_then(|name| name.split_once(':'));
        let Some((namespace, account)) = account else { return Err(Unfit::Account(clip(&review.username))) };
        let claim = |claim: &'static str| match review.extra.get(claim).map(Vec::as_slice) {
            Some([value]) if !value.is_empty() => Ok(value.as_str()),
            _ => Err(Unfit::Unbound { account: format!("{namespace}/{account}"), claim }),
        };
        let (node, pod, _uid) = (claim(NODE_CLAIM)?, claim(POD_CLAIM)?, claim(POD_UID_CLAIM)?);
        let trusted = self.trusted.iter().any(|it| it.namespace == namespace && it.account == account);
        let grant = if trusted {
            Grant::Node
        } else {
            Grant::Own { namespace: namespace.to_owned(), account: account.to_owned(), pod: pod.to_owned() }
        };
        Ok(Caller { node: NodeName::from(node), grant })
    }

    fn remembered(&self, hash: &[u8; 32]) -> Option<Caller> {
        let good = self.good.lock();
        good.get(hash).filter(|it| Instant::now() < it.until).map(|it| it.caller.clone())
    }

    fn remember(&self, hash: [u8; 32], caller: Caller) {
        let now = Instant::now();
        let mut good = self.good.lock();
        if good.len() >= MAX_REMEMBERED {
            good.retain(|_, it| now < it.until);
        }
        // Full of answers that count: this one is asked for again.
        if good.len() < MAX_REMEMBERED {
            good.insert(hash, Remembered { caller, until: now + REMEMBER });
        }
    }
}

#[tonic::async_trait]
impl<R: Reviewer> NodeAuthenticator for TokenReviews<R> {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        self.caller(bearer(metadata)?).await
    }
}

fn unfit(reason: &Unfit) -> Status {
    Status::unauthenticated(reason.to_string())
}

/// What the API server repeats of a token may be long.
fn clip(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
#[path = "review_tests.rs"]
mod tests;
