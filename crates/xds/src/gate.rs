//! When to commit: a pure helper for clients that apply all types of a generation at once.

use std::collections::BTreeMap;

use crate::Generation;
use crate::state::Delivery;

/// Follows what generation each type shows within one connection.
///
/// The client stages every delivery, then does as [`Gate::delivered`] says. What is staged survives a lost connection: its
/// acknowledged parts count as held, and are committed with whatever generation completes next.
#[derive(Debug, Clone)]
pub struct Gate {
    shown: BTreeMap<String, Option<u64>>,
}

/// What to do with a delivery once it is staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Part of a larger push: acknowledge it now, or the next part never comes.
    Acknowledge,
    /// Complete, but another type has not shown this generation yet: acknowledge it after the commit.
    Hold,
    /// Everything staged is one whole: commit it, then acknowledge this delivery and those held.
    Commit,
}

impl Gate {
    /// A gate for these types; call it again, or [`Gate::connected`], for each connection.
    pub fn new<T: Into<String>>(types: impl IntoIterator<Item = T>) -> Self {
        Self { shown: types.into_iter().map(|type_url| (type_url.into(), None)).collect() }
    }

    /// A new connection: generations of the last one mean nothing any more.
    pub fn connected(&mut self) {
        self.shown.values_mut().for_each(|shown| *shown = None);
    }

    /// Notes what a delivery shows.
    pub fn delivered(&mut self, delivery: &Delivery) -> Verdict {
        let (number, last) = match delivery.generation {
            Generation::Foreign(_) => return Verdict::Commit,
            Generation::Ours { number, last } => (number, last),
        };
        if !last {
            return Verdict::Acknowledge;
        }
        self.shown.insert(delivery.type_url.clone(), Some(number));
        if self.shown.values().all(|shown| *shown == Some(number)) { Verdict::Commit } else { Verdict::Hold }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(type_url: &str, generation: &str) -> Delivery {
        Delivery {
            type_url: type_url.to_owned(),
            generation: Generation::parse(generation),
            added: Vec::new(),
            removed: Vec::new(),
            nonce: "1".to_owned(),
        }
    }

    #[test]
    fn commits_when_all_types_show_the_same() {
        let mut gate = Gate::new(["a", "b"]);
        assert_eq!(gate.delivered(&delivery("a", "culvert/1+")), Verdict::Acknowledge);
        assert_eq!(gate.delivered(&delivery("a", "culvert/1")), Verdict::Hold);
        assert_eq!(gate.delivered(&delivery("b", "culvert/1")), Verdict::Commit);
        assert_eq!(gate.delivered(&delivery("b", "culvert/2")), Verdict::Hold);
        gate.connected();
        assert_eq!(
            gate.delivered(&delivery("a", "culvert/2")),
            Verdict::Hold,
            "b has not shown 2 on this connection"
        );
        assert_eq!(gate.delivered(&delivery("b", "culvert/2")), Verdict::Commit);
        assert_eq!(gate.delivered(&delivery("b", "some time/9")), Verdict::Commit);
    }
}
