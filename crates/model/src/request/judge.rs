//! The walk over the policies of a service: CUSTOM, then DENY, then ALLOW (W53).

use std::sync::Arc;

use super::{
    Action, Asked, Condition, Denial, Explanation, Findings, Permit, PolicySet, Question, RequestFacts,
    RequestPolicy, Rule, Step, Truth, Verdict, Would, matching,
};
use crate::outcome::Reason;
use crate::trace::{Silent, Trace};

/// Judges a request by the policies of the service that it is for:
///
/// 1. a policy was not understood: denied;
/// 2. CUSTOM policies match: their providers are asked, and the rest waits for [`Question::granted`];
/// 3. any DENY policy matches: denied;
/// 4. there is no ALLOW policy: allowed;
/// 5. any ALLOW policy surely matches: allowed, otherwise denied.
///
/// AUDIT policies and policies on trial decide nothing and are reported.
pub fn judge(policies: &PolicySet, facts: &RequestFacts<'_>) -> Verdict {
    Judge { policies, facts, trace: Silent }.verdict()
}

/// [`judge()`], with every step of it.
pub fn explain(policies: &PolicySet, facts: &RequestFacts<'_>) -> Explanation {
    let mut steps = Vec::new();
    let mut judge = Judge { policies, facts, trace: &mut steps };
    let verdict = judge.verdict();
    let granted = matches!(verdict, Verdict::Ask(_)).then(|| judge.decision());
    Explanation { verdict, granted, steps }
}

impl Question {
    /// Every provider that was asked agreed: judges the request as it is now by the other policies.
    ///
    /// # Errors
    /// The [`Denial`], with [`Reason::PolicyUnavailable`] for a policy that was not understood.
    pub fn granted(self, policies: &PolicySet, facts: &RequestFacts<'_>) -> Result<Permit, Denial> {
        let mut judge = Judge { policies, facts, trace: Silent };
        // The policies may have changed since.
        judge.all_understood()?;
        judge.decision()
    }
}

struct Judge<'a, T> {
    policies: &'a PolicySet,
    facts: &'a RequestFacts<'a>,
    trace: T,
}

impl<'a, T: Trace<Step>> Judge<'a, T> {
    fn verdict(&mut self) -> Verdict {
        if let Err(denial) = self.all_understood() {
            return Verdict::Deny(denial);
        }
        let asked = self.asked();
        if !asked.is_empty() {
            return Verdict::Ask(Question { asked });
        }
        match self.decision() {
            Ok(permit) => Verdict::Allow(permit),
            Err(denial) => Verdict::Deny(denial),
        }
    }

    fn all_understood(&mut self) -> Result<(), Denial> {
        let Some(policy) = self.policies.undecodable.first() else { return Ok(()) };
        let key = &policy.key;
        let why = policy.undecodable.clone().unwrap_or_else(|| "".into());
        let detail = format!("policy {key} applies and is not understood: {why}");
        self.trace.record(|| Step::Undecodable { policy: key.clone(), reason: why });
        let (reason, policy) = (Reason::PolicyUnavailable, Some(key.clone()));
        Err(Denial { reason, policy, detail, findings: Findings::default() })
    }

    fn asked(&mut self) -> Vec<Asked> {
        let mut asked: Vec<Asked> = Vec::new();
        for policy in enforced(&self.policies.custom) {
            let Action::Custom(provider) = &policy.action else { continue };
            let known = asked.iter().any(|one| one.provider == *provider);
            if !known && self.matches(policy) {
                asked.push(Asked { provider: provider.clone(), policy: policy.key.clone() });
            }
        }
        asked
    }

    fn decision(&mut self) -> Result<Permit, Denial> {
        let mut findings = Findings::default();
        self.notice(&mut findings);
        for policy in enforced(&self.policies.deny) {
            if self.matches(policy) {
                let detail = format!("denied by policy {}", policy.key);
                let policy = Some(policy.key.clone());
                return Err(Denial { reason: Reason::AuthorizationPolicy, policy, detail, findings });
            }
        }
        let trial_would_refuse = self.try_allow(&mut findings);
        let allowed = self.allowed();
        // An ALLOW policy on trial would refuse what it does not match, unless another one allows it.
        if let (Ok(None), Some(policy)) = (&allowed, trial_would_refuse) {
            findings.dry_run.push(would(policy, "deny"));
        }
        match allowed {
            Ok(by) => Ok(Permit { by: by.map(|policy| policy.key.clone()), findings }),
            Err(()) => {
                let detail = "no ALLOW policy of the service matches".to_owned();
                Err(Denial { reason: Reason::AuthorizationPolicy, policy: None, detail, findings })
            }
        }
    }

    /// What AUDIT policies and those on trial say, but for ALLOW.
    fn notice(&mut self, findings: &mut Findings) {
        for policy in enforced(&self.policies.audit) {
            if self.matches(policy) {
                findings.audit.push(policy.key.clone());
            }
        }
        if !self.policies.any_trial {
            return;
        }
        let set = self.policies;
        for policy in [&set.custom, &set.deny, &set.audit].into_iter().flat_map(|list| on_trial(list)) {
            if self.matches(policy) {
                findings.dry_run.push(would(policy, policy.action.as_str()));
            }
        }
    }

    /// What ALLOW policies on trial say. Returns one that would refuse, if none of them would allow.
    fn try_allow(&mut self, findings: &mut Findings) -> Option<&'a RequestPolicy> {
        if !self.policies.any_trial {
            return None;
        }
        let (mut failed, mut matched) = (None, false);
        for policy in on_trial(&self.policies.allow) {
            if self.matches(policy) {
                matched = true;
                findings.dry_run.push(would(policy, "allow"));
            } else {
                failed = failed.or(Some(policy));
            }
        }
        failed.filter(|_| !matched)
    }

    /// The enforced ALLOW policy that matches; `None` where there is none; an error where none matches.
    fn allowed(&mut self) -> Result<Option<&'a RequestPolicy>, ()> {
        let mut any = false;
        for policy in enforced(&self.policies.allow) {
            any = true;
            if self.matches(policy) {
                return Ok(Some(policy));
            }
        }
        self.trace.record(|| if any { Step::NoneAllowed } else { Step::NoAllowPolicy });
        if any { Err(()) } else { Ok(None) }
    }

    /// Rules are alternatives; a policy without any never matches.
    fn matches(&mut self, policy: &RequestPolicy) -> bool {
        let enough = match policy.action {
            Action::Allow => Truth::Yes,
            Action::Deny | Action::Audit | Action::Custom(_) => Truth::Maybe,
        };
        let matched =
            policy.rules.iter().enumerate().any(|(index, rule)| self.rule(policy, index, rule) >= enough);
        self.trace.record(|| Step::Policy {
            policy: policy.key.clone(),
            action: policy.action.as_str(),
            dry_run: policy.dry_run,
            matched,
        });
        matched
    }

    fn rule(&mut self, policy: &RequestPolicy, index: usize, rule: &Rule) -> Truth {
        let mut holds = Truth::Yes;
        for (part, alternatives) in [("to", &rule.to), ("from", &rule.from)] {
            if holds > Truth::No && !alternatives.is_empty() {
                let best = self.best_of(alternatives, |judge, at, condition| {
                    judge.condition(policy, index, (part, at), condition)
                });
                holds = holds.min(best);
            }
        }
        if holds > Truth::No {
            let all = self
                .all(&rule.when, |judge, condition| judge.condition(policy, index, ("when", 0), condition));
            holds = holds.min(all);
        }
        self.trace.record(|| Step::Rule { policy: policy.key.clone(), rule: index, holds });
        holds
    }

    fn best_of(
        &mut self,
        alternatives: &[Vec<Condition>],
        mut holds: impl FnMut(&mut Self, usize, &Condition) -> Truth,
    ) -> Truth {
        let mut best = Truth::No;
        for (at, conditions) in alternatives.iter().enumerate() {
            best = best.max(self.all(conditions, |judge, condition| holds(judge, at, condition)));
            if best == Truth::Yes {
                break;
            }
        }
        best
    }

    fn all(
        &mut self,
        conditions: &[Condition],
        mut holds: impl FnMut(&mut Self, &Condition) -> Truth,
    ) -> Truth {
        let mut worst = Truth::Yes;
        for condition in conditions {
            worst = worst.min(holds(self, condition));
            if worst == Truth::No {
                break;
            }
        }
        worst
    }

    fn condition(
        &mut self,
        policy: &RequestPolicy,
        rule: usize,
        (part, index): (&'static str, usize),
        condition: &Condition,
    ) -> Truth {
        let holds = matching::evaluate(condition, self.facts);
        self.trace.record(|| Step::Condition {
            policy: policy.key.clone(),
            rule,
            part,
            index,
            condition: condition.name.clone(),
            holds,
        });
        holds
    }
}

fn enforced(list: &[Arc<RequestPolicy>]) -> impl Iterator<Item = &RequestPolicy> {
    list.iter().map(|policy| &**policy).filter(|policy| !policy.dry_run)
}

fn on_trial(list: &[Arc<RequestPolicy>]) -> impl Iterator<Item = &RequestPolicy> {
    list.iter().map(|policy| &**policy).filter(|policy| policy.dry_run)
}

fn would(policy: &RequestPolicy, would: &'static str) -> Would {
    Would { policy: policy.key.clone(), would }
}
