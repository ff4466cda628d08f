//! Addresses for names that have none, out of 240.240.0.0/16: one that no network routes, so that it can only mean ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use sha2::{Digest, Sha256};

/// 240.240.0.1 to 240.240.255.254.
const SLOTS: u32 = 65_534;
const BASE: u32 = u32::from_be_bytes([240, 240, 0, 1]);

/// Allocates an address for each name. A name keeps what it had; a new one gets the address its hash says, or the next
/// that is free, so that every controller that starts with the same names gives the same addresses. With all of them in
/// use the last names get none.
pub(super) fn allocate(
    names: &BTreeSet<String>,
    previous: &BTreeMap<String, Ipv4Addr>,
    taken: &BTreeSet<Ipv4Addr>,
) -> BTreeMap<String, Ipv4Addr> {
    let mut out: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
    let mut used = taken.clone();
    for (name, address) in previous {
        if names.contains(name) && used.insert(*address) {
            out.insert(name.clone(), *address);
        }
    }
    for name in names {
        if out.contains_key(name) {
            continue;
        }
        let start = slot(name);
        let free =
            (0..SLOTS).map(|step| Ipv4Addr::from(BASE + (start + step) % SLOTS)).find(|ip| used.insert(*ip));
        let Some(address) = free else { break };
        out.insert(name.clone(), address);
    }
    out
}

fn slot(name: &str) -> u32 {
    let hash = Sha256::digest(name.as_bytes());
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) % SLOTS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_name_has_its_own_and_keeps_it(
            first in prop::collection::btree_set("[a-c]{1,4}", 0..40),
            second in prop::collection::btree_set("[a-c]{1,4}", 0..40),
        ) {
            let none = BTreeSet::new();
            let before = allocate(&first, &BTreeMap::new(), &none);
            prop_assert_eq!(before.len(), first.len());
            let after = allocate(&second, &before, &none);
            let distinct: BTreeSet<_> = after.values().collect();
            prop_assert_eq!(distinct.len(), second.len());
            for (name, address) in &after {
                prop_assert_eq!(&address.octets()[..2], &[240, 240]);
                if let Some(had) = before.get(name) {
                    prop_assert_eq!(had, address);
                }
            }
        }
    }

    #[test]
    fn a_collision_moves_the_newcomer_and_an_address_in_use_is_left_alone() {
        let one: BTreeSet<String> = ["ns/a.example".to_owned()].into();
        let wanted = allocate(&one, &BTreeMap::new(), &BTreeSet::new())["ns/a.example"];
        let moved = allocate(&one, &BTreeMap::new(), &BTreeSet::from([wanted]))["ns/a.example"];
        assert_eq!(u32::from(moved), u32::from(wanted) + 1);
        let holder = BTreeMap::from([("ns/b.example".to_owned(), wanted)]);
        let both: BTreeSet<String> = ["ns/a.example".to_owned(), "ns/b.example".to_owned()].into();
        let after = allocate(&both, &holder, &BTreeSet::new());
        assert_eq!((after["ns/b.example"], after["ns/a.example"]), (wanted, moved));
    }
}
