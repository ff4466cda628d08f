//! The engine against the specification, on 100,000 random pairs of policies and requests.

use std::collections::BTreeMap;

use culvert_model::outcome::Reason;
use culvert_model::request::{self, Findings};

use crate::generate::Dice;
use crate::specification::{Outcome, Verdict, outcome};
use crate::world::set_of;

const PAIRS: u64 = 100_000;

fn of_engine(verdict: &request::Verdict) -> Outcome {
    let none = Findings::default();
    let (verdict, findings) = match verdict {
        request::Verdict::Allow(permit) => {
            let verdict = permit.by().map(|policy| Verdict::AllowedBy(policy.name.to_string()));
            (verdict.unwrap_or(Verdict::NoAllow), permit.findings())
        }
        request::Verdict::Deny(denial) => {
            let verdict = match &denial.policy {
                _ if denial.reason == Reason::PolicyUnavailable => Verdict::Broken,
                Some(policy) => Verdict::DeniedBy(policy.name.to_string()),
                None => Verdict::NoneAllows,
            };
            (verdict, &denial.findings)
        }
        request::Verdict::Ask(question) => {
            (Verdict::Ask(question.asked().iter().map(|one| one.provider.to_string()).collect()), &none)
        }
    };
    Outcome {
        verdict,
        audit: findings.audit.iter().map(|policy| policy.name.to_string()).collect(),
        dry_run: findings.dry_run.iter().map(|one| format!("{} {}", one.would, one.policy.name)).collect(),
    }
}

/// W53, W54, W55.
#[test]
fn the_engine_says_what_the_specification_says() {
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..PAIRS {
        let mut dice = Dice::new(seed);
        let (policies, request) = (dice.policies(), dice.request());
        let set = set_of(&policies);
        let verdict = request.judge(&set);
        let (engine, specification) = (of_engine(&verdict), outcome(&policies, &request));
        assert_eq!(engine, specification, "seed {seed}\n{policies:#?}\n{request:#?}");
        let kind = match specification.verdict {
            Verdict::Broken => "broken",
            Verdict::Ask(_) => "asked",
            Verdict::DeniedBy(_) => "denied by a rule",
            Verdict::NoneAllows => "denied for want of a rule",
            Verdict::AllowedBy(_) => "allowed by a rule",
            Verdict::NoAllow => "allowed without a rule",
        };
        *seen.entry(kind).or_default() += 1;
        *seen.entry("audited").or_default() += u64::from(!specification.audit.is_empty());
        *seen.entry("tried").or_default() += u64::from(!specification.dry_run.is_empty());
        if seed % 20 == 0 {
            assert_eq!(request.ask(|facts| request::explain(&set, facts)).verdict, verdict, "seed {seed}");
        }
    }
    // Nothing is shown by policies and requests that never meet.
    for (kind, share) in [
        ("broken", 1),
        ("asked", 3),
        ("denied by a rule", 10),
        ("denied for want of a rule", 15),
        ("allowed by a rule", 10),
        ("allowed without a rule", 10),
        ("audited", 2),
        ("tried", 5),
    ] {
        let count = seen.get(kind).copied().unwrap_or(0);
        assert!(count * 100 >= PAIRS * share, "{kind}: {count} of {PAIRS}, {seen:?}");
    }
}
