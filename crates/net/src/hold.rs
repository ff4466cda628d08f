//! Stopping a pod's traffic from the node's side, where nothing that happens inside the pod can undo it.

use std::collections::BTreeSet;

use crate::NetNs;
use crate::nft::{Batch, Chain, Cmp, HookPoint, HookType, NftError, Rule, Verdict};

/// Name of the table, in the node's namespace, while somebody is held.
pub const TABLE: &str = "culvert_hold";
/// Before everything else.
const FIRST: i32 = -500;

/// Makes exactly these interfaces of the node let nothing in or out; an empty set releases all. One transaction.
///
/// What a pod sends is dropped as its interface takes it in, bridged or routed. What is routed to a pod is dropped as it leaves;
/// what a bridge sends there arrives, and cannot be answered.
///
/// # Errors
/// See [`NftError`]: then what was held before still is, and no more.
pub fn set(node: &NetNs, interfaces: &BTreeSet<String>) -> Result<(), NftError> {
    let mut batch = Batch::new();
    // One that is gone holds nobody, and would make the kernel refuse the others.
    let here = |name: &&String| node.run(|| crate::sys::interface_index(name)).is_ok();
    let interfaces: Vec<&String> = interfaces.iter().filter(here).collect();
    if interfaces.is_empty() {
        return batch.delete_table(TABLE).commit(node);
    }
    let out = Chain::base("to_pods", HookType::Filter, HookPoint::Postrouting, FIRST);
    batch.replace_table(TABLE).add_chain(TABLE, &out);
    for name in interfaces {
        let into = Chain::ingress(&format!("from_{name}"), name, FIRST);
        let held = || Rule::new("held: the pod's redirection is not in force").counter();
        batch.add_chain(TABLE, &into).add_rule(TABLE, &into.name, &held().verdict(Verdict::Drop)).add_rule(
            TABLE,
            &out.name,
            &held().oifname(Cmp::Eq, name).verdict(Verdict::Drop),
        );
    }
    batch.commit(node)
}
