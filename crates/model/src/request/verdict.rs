//! What is decided about a request, and how it came about.

use serde::Serialize;

use super::Truth;
use crate::Str;
use crate::outcome::Reason;
use crate::policy::PolicyKey;

/// May it pass?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Allow(Permit),
    /// No: 403 with [`Denial::BODY`], or gRPC's PERMISSION_DENIED.
    Deny(Denial),
    /// Providers have to be asked first. They may change the request, so DENY and ALLOW policies are judged after them.
    Ask(Question),
}

/// The proof that a request may go on. Only this module makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    pub(super) by: Option<PolicyKey>,
    pub(super) findings: Findings,
}

/// Why a request may not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Denial {
    /// For logs and metrics.
    pub reason: Reason,
    /// The policy that decided, if it was one.
    pub policy: Option<PolicyKey>,
    /// For people; not for the client.
    pub detail: String,
    /// What others said.
    pub findings: Findings,
}

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a request that nobody was asked about must not pass"]
pub struct Question {
    pub(super) asked: Vec<Asked>,
}

/// One provider to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Who. One that is not known, or does not answer, refuses: [`Question::refused`].
    pub provider: Str,
    /// On whose behalf; the first by name, if several policies name the same provider.
    pub policy: PolicyKey,
}

/// What was noticed and decides nothing; for the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// What policies on trial would have done (W64).
    pub dry_run: Vec<Would>,
    /// AUDIT policies that match.
    pub audit: Vec<PolicyKey>,
}

/// What a policy on trial would have done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Would {
    /// The policy.
    pub policy: PolicyKey,
    /// `allow`, `deny`, `audit` or `ask`. `deny` of an ALLOW policy: nothing would have allowed the request.
    pub would: &'static str,
}

/// A verdict and how it came about.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What [`super::judge()`] returns for the same arguments.
    pub verdict: Verdict,
    /// What follows if every provider that is asked agrees and changes nothing; `None` where nobody is asked.
    pub granted: Option<Result<Permit, Denial>>,
    /// What was looked at, in order. What no longer mattered was not looked at and is not here.
    pub steps: Vec<Step>,
}

/// One step of a verdict. `rule` and `index` count from 0, as the policy is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// A policy that was not understood is for this service: denied.
    Undecodable {
        /// The policy.
        policy: PolicyKey,
        /// Why.
        reason: Str,
    },
    /// One of the things that a rule asks for was compared.
    Condition {
        /// The policy.
        policy: PolicyKey,
        /// Which rule.
        rule: usize,
        /// `from`, `to` or `when`.
        part: &'static str,
        /// Which of the part's alternatives; 0 for `when`.
        index: usize,
        /// What was compared: `not_paths`, `request.headers[x-a]`.
        condition: Str,
        /// How it went.
        holds: Truth,
    },
    /// A rule was decided.
    Rule {
        /// The policy.
        policy: PolicyKey,
        /// Which rule.
        rule: usize,
        /// How surely it matches.
        holds: Truth,
    },
    /// A policy was decided.
    Policy {
        /// The policy.
        policy: PolicyKey,
        /// `allow`, `deny`, `audit` or `ask`.
        action: &'static str,
        /// It is on trial.
        dry_run: bool,
        /// Whether it matches: ALLOW has to be sure, the others need not.
        matched: bool,
    },
    /// No enforced ALLOW policy is for this service: allowed.
    NoAllowPolicy,
    /// There are enforced ALLOW policies and none matched: denied.
    NoneAllowed,
}

impl Permit {
    /// The ALLOW policy that matched; `None` where there is none.
    pub fn by(&self) -> Option<&PolicyKey> {
        self.by.as_ref()
    }

    /// What others said.
    pub fn findings(&self) -> &Findings {
        &self.findings
    }
}

impl Denial {
    /// The body of the answer (W57): no word of why.
    pub const BODY: &'static str = "RBAC: access denied";
}

impl Question {
    /// Every provider to ask, each once. All have to agree.
    pub fn asked(&self) -> &[Asked] {
        &self.asked
    }

    /// A provider refused, is not known or did not answer.
    pub fn refused(&self, by: &Asked, detail: &str) -> Denial {
        Denial {
            reason: Reason::AuthorizationPolicy,
            policy: Some(by.policy.clone()),
            detail: format!("provider {}, asked for policy {}: {detail}", by.provider, by.policy),
            findings: Findings::default(),
        }
    }
}
