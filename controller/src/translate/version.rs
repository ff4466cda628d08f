//! A resource's version: a hash of what it says, so that it is the same after a restart and on every replica (D13).

use std::collections::BTreeMap;

use culvert_proto::security::Authorization;
use culvert_proto::workload::{Address, PortList, address};
use prost::Message;
use sha2::{Digest, Sha256};

/// Hex digits: 64 bits. A version is compared with the one version a client has of the same resource, never with others.
const DIGITS: usize = 16;

/// The version of an address. A map has no order on the wire, so its entries are hashed in that of their keys.
pub fn of_address(message: &Address) -> String {
    let mut hash = Sha256::new();
    match &message.r#type {
        Some(address::Type::Workload(workload)) => {
            let sorted: BTreeMap<&String, &PortList> = workload.services.iter().collect();
            for (key, ports) in sorted {
                hash.update((key.len() as u64).to_be_bytes());
                hash.update(key);
                hash.update(ports.encode_length_delimited_to_vec());
            }
            let mut rest = workload.clone();
            rest.services.clear();
            hash.update(rest.encode_to_vec());
        }
        Some(address::Type::Service(service)) => hash.update(service.encode_to_vec()),
        None => {}
    }
    text(hash)
}

/// The version of a policy.
pub fn of_policy(message: &Authorization) -> String {
    of_message(message)
}

/// The version of a message without maps.
pub fn of_message(message: &impl Message) -> String {
    text(Sha256::new().chain_update(message.encode_to_vec()))
}

fn text(hash: Sha256) -> String {
    let mut text: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(DIGITS);
    text
}

#[cfg(test)]
mod tests {
    use culvert_proto::workload::{Port, Workload};

    use super::*;

    #[test]
    fn the_order_of_a_map_is_no_part_of_a_version() {
        let address = |names: &[&str], port| {
            let list = PortList { ports: vec![Port { service_port: port, ..Port::default() }] };
            let services = names.iter().map(|name| ((*name).to_owned(), list.clone())).collect();
            let workload = Workload { uid: "u".into(), services, ..Workload::default() };
            of_address(&Address { r#type: Some(address::Type::Workload(workload)) })
        };
        let names: Vec<String> = (0..50).map(|n| format!("n/{n}")).collect();
        let forward: Vec<&str> = names.iter().map(String::as_str).collect();
        let backward: Vec<&str> = forward.iter().rev().copied().collect();
        assert_eq!(address(&forward, 1), address(&backward, 1));
        assert_ne!(address(&forward, 1), address(&forward, 2));
        assert_ne!(address(&forward, 1), address(&forward[1..], 1));
        assert_eq!(address(&forward, 1).len(), DIGITS);
    }
}
