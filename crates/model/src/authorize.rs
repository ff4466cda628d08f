//! May this connection reach this workload? One decision, from one snapshot (Z58-Z64).
//!
//! [`authorize`] and [`explain`] are the same walk; the second writes down each step. Three things differ from what Istio's
//! tunnel does, all towards refusing: a policy that the workload names but that is not known denies (there it is skipped,
//! Z64), so does one that could not be understood, and a workload bound to a waypoint accepts nobody else (Z52). One differs towards what people mean: a principal may be written with
//! `spiffe://` (there such a pattern never matches, Z61, U22).

use std::net::SocketAddr;

use serde::Serialize;

mod bound;
mod matching;

pub(crate) use matching::{parts_match, principal};

use crate::Str;
use crate::identity::Identity;
use crate::outcome::Reason;
use crate::policy::{Action, Policy, PolicyKey, PolicyScope};
use crate::snapshot::{Applicable, Snapshot};
use crate::trace::{Silent, Trace};
use crate::workload::Workload;

/// What is known of a connection besides its destination workload.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionFacts<'a> {
    /// Who the TLS peer proved to be; `None` for plaintext.
    pub identity: Option<&'a Identity>,
    /// The TCP peer (Z50).
    pub source: SocketAddr,
    /// Where the application listens, after the tunnel (Z50).
    pub destination: SocketAddr,
}

/// The proof that a connection may go on. Only this module makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    by: Option<PolicyKey>,
    dry_run: Vec<DryRun>,
}

/// Why a connection may not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Denial {
    /// For logs and metrics.
    pub reason: Reason,
    /// The policy that decided, if it was one.
    pub policy: Option<PolicyKey>,
    /// For people.
    pub detail: String,
    /// What policies on trial would have said.
    pub dry_run: Vec<DryRun>,
}

/// What a policy on trial would have done; for the log only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DryRun {
    /// The policy.
    pub policy: PolicyKey,
    /// What it would have done. `Deny` of an ALLOW policy: nothing would have allowed the connection.
    pub would: Action,
}

/// A verdict and how it came about.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What [`authorize`] returns for the same arguments.
    pub verdict: Result<Permit, Denial>,
    /// What was looked at, in order. What no longer mattered was not looked at and is not here.
    pub steps: Vec<Step>,
}

/// One step of a verdict. `group`, `rule` and `index` count from 0, as the policy is written on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// The workload names a policy that is not known: denied.
    Missing {
        /// The name.
        name: Str,
    },
    /// A policy that could not be understood is in scope: denied.
    Undecodable {
        /// The policy.
        policy: PolicyKey,
        /// Why.
        reason: Str,
    },
    /// One match of a rule was compared.
    Match {
        /// The policy.
        policy: PolicyKey,
        /// Which group.
        group: usize,
        /// Which rule of the group.
        rule: usize,
        /// Which match of the rule.
        index: usize,
        /// How it went.
        result: MatchResult,
    },
    /// A rule was decided.
    Rule {
        /// The policy.
        policy: PolicyKey,
        /// Which group.
        group: usize,
        /// Which rule of the group.
        rule: usize,
        /// Whether it matched.
        matched: bool,
    },
    /// A policy was decided.
    Policy {
        /// The policy.
        policy: PolicyKey,
        /// What a match means.
        action: Action,
        /// How it came to apply.
        scope: PolicyScope,
        /// It is on trial.
        dry_run: bool,
        /// Whether it matched.
        matched: bool,
    },
    /// The workload is bound to a waypoint, which the peer is not: denied.
    PastWaypoint {
        /// For people.
        detail: String,
    },
    /// No enforced ALLOW policy applies: allowed.
    NoAllowPolicy,
    /// There are enforced ALLOW policies and none matched: denied.
    NoneAllowed,
}

/// How one match went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MatchResult {
    /// Every field that is present matched.
    Matched,
    /// It has no field at all, and is skipped (Z59).
    Skipped,
    /// This field did not match.
    Failed(&'static str),
}

impl Permit {
    /// The ALLOW policy that matched; `None` where none applies.
    pub fn by(&self) -> Option<&PolicyKey> {
        self.by.as_ref()
    }

    /// What policies on trial would have said.
    pub fn dry_run(&self) -> &[DryRun] {
        &self.dry_run
    }
}

/// Judges a connection to `destination` by the way it came and by every policy that applies (Z63):
///
/// 1. it is bound to a waypoint, and the peer is none of that: denied;
/// 2. a named policy that is not known, or one in scope that was not understood: denied;
/// 3. any DENY policy matches: denied;
/// 4. no ALLOW policy applies: allowed;
/// 5. any ALLOW policy matches: allowed, otherwise denied.
///
/// Policies on trial decide nothing and are reported.
///
/// # Errors
/// [`Denial`] with [`Reason::WaypointRequired`] (1), [`Reason::PolicyUnavailable`] (2) or [`Reason::AuthorizationPolicy`].
pub fn authorize(
    snapshot: &Snapshot,
    destination: &Workload,
    facts: &ConnectionFacts<'_>,
) -> Result<Permit, Denial> {
    Judge { snapshot, destination, facts, trace: Silent }.verdict()
}

/// [`authorize`], with every step of it.
pub fn explain(snapshot: &Snapshot, destination: &Workload, facts: &ConnectionFacts<'_>) -> Explanation {
    let mut steps = Vec::new();
    let verdict = Judge { snapshot, destination, facts, trace: &mut steps }.verdict();
    Explanation { verdict, steps }
}

struct Judge<'a, T> {
    snapshot: &'a Snapshot,
    destination: &'a Workload,
    facts: &'a ConnectionFacts<'a>,
    trace: T,
}

impl<'a, T: Trace<Step>> Judge<'a, T> {
    fn verdict(&mut self) -> Result<Permit, Denial> {
        self.came_through_waypoint()?;
        self.all_understood()?;
        let mut dry_run = Vec::new();
        for policy in self.policies(Action::Deny, true) {
            if self.matches(policy) {
                dry_run.push(DryRun { policy: policy.key.clone(), would: Action::Deny });
            }
        }
        for policy in self.policies(Action::Deny, false) {
            if self.matches(policy) {
                let detail = format!("denied by policy {}", policy.key);
                let reason = Reason::AuthorizationPolicy;
                return Err(Denial { reason, policy: Some(policy.key.clone()), detail, dry_run });
            }
        }
        let mut trial_failed = None;
        let mut trial_matched = false;
        for policy in self.policies(Action::Allow, true) {
            if self.matches(policy) {
                trial_matched = true;
                dry_run.push(DryRun { policy: policy.key.clone(), would: Action::Allow });
            } else {
                trial_failed = trial_failed.or(Some(policy));
            }
        }
        let allowed = self.allowed();
        // An ALLOW policy on trial would refuse what it does not match, unless another one allows it.
        if let (Ok(None), Some(policy), false) = (&allowed, trial_failed, trial_matched) {
            dry_run.push(DryRun { policy: policy.key.clone(), would: Action::Deny });
        }
        match allowed {
            Ok(by) => {
                let by = by.map(|policy| policy.key.clone());
                Ok(Permit { by, dry_run })
            }
            Err(()) => {
                let detail = format!("no ALLOW policy of {} matches", self.destination.uid);
                Err(Denial { reason: Reason::AuthorizationPolicy, policy: None, detail, dry_run })
            }
        }
    }

    fn came_through_waypoint(&mut self) -> Result<(), Denial> {
        let Some(detail) = bound::refusal(self.snapshot, self.destination, self.facts.identity) else {
            return Ok(());
        };
        self.trace.record(|| Step::PastWaypoint { detail: detail.clone() });
        Err(Denial { reason: Reason::WaypointRequired, policy: None, detail, dry_run: Vec::new() })
    }

    fn all_understood(&mut self) -> Result<(), Denial> {
        for applicable in self.snapshot.policies_for(self.destination) {
            let (policy, detail) = match applicable {
                Applicable::Missing(name) => {
                    self.trace.record(|| Step::Missing { name: name.clone() });
                    (None, format!("policy {name} applies and is not known"))
                }
                Applicable::Policy(policy) => {
                    let Some(reason) = &policy.undecodable else { continue };
                    let key = &policy.key;
                    self.trace.record(|| Step::Undecodable { policy: key.clone(), reason: reason.clone() });
                    (Some(key.clone()), format!("policy {key} applies and is not understood: {reason}"))
                }
            };
            return Err(Denial { reason: Reason::PolicyUnavailable, policy, detail, dry_run: Vec::new() });
        }
        Ok(())
    }

    /// The enforced ALLOW policy that matches; `None` where none applies; an error where none matches.
    fn allowed(&mut self) -> Result<Option<&'a Policy>, ()> {
        let mut any = false;
        for policy in self.policies(Action::Allow, false) {
            any = true;
            if self.matches(policy) {
                return Ok(Some(policy));
            }
        }
        self.trace.record(|| if any { Step::NoneAllowed } else { Step::NoAllowPolicy });
        if any { Err(()) } else { Ok(None) }
    }

    fn policies(&self, action: Action, dry_run: bool) -> impl Iterator<Item = &'a Policy> + use<'a, T> {
        let (snapshot, destination) = (self.snapshot, self.destination);
        snapshot.policies_for(destination).filter_map(move |applicable| match applicable {
            Applicable::Policy(policy) if policy.action == action && policy.dry_run == dry_run => {
                Some(&**policy)
            }
            Applicable::Policy(_) | Applicable::Missing(_) => None,
        })
    }

    /// Groups are alternatives; within a group every rule has to match (Z58). A policy without groups never matches (Z59).
    fn matches(&mut self, policy: &Policy) -> bool {
        let matched = (0..policy.groups.len()).any(|group| {
            (0..policy.groups[group].rules.len()).all(|rule| self.rule_matches(policy, group, rule))
        });
        self.trace.record(|| Step::Policy {
            policy: policy.key.clone(),
            action: policy.action,
            scope: policy.scope,
            dry_run: policy.dry_run,
            matched,
        });
        matched
    }

    /// Matches are alternatives; a rule without any matches everything (Z59).
    fn rule_matches(&mut self, policy: &Policy, group: usize, rule: usize) -> bool {
        let matches = &policy.groups[group].rules[rule].matches;
        let mut matched = matches.is_empty();
        for (index, one) in matches.iter().enumerate() {
            let result = matching::evaluate(one, self.facts);
            let policy = &policy.key;
            self.trace.record(|| Step::Match { policy: policy.clone(), group, rule, index, result });
            if result == MatchResult::Matched {
                matched = true;
                break;
            }
        }
        self.trace.record(|| Step::Rule { policy: policy.key.clone(), group, rule, matched });
        matched
    }
}
