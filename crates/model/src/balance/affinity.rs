//! Which endpoint is a client's, where a service keeps clients (`sessionAffinity: ClientIP`).
//!
//! By rendezvous: every endpoint gets a score for the client's address, and the highest has it. Nothing is remembered, so
//! every proxy of the mesh gives a client the same answer, after a restart too; an endpoint that goes moves its own clients
//! and no other, and one that comes takes its share and nothing else. A service's timeout is the time for which an idle
//! client has to be remembered at least; here it is remembered for as long as its endpoint is there.

use std::net::IpAddr;

use super::{Candidate, Choice};

impl<'a> Choice<'_, 'a, '_> {
    /// The best-placed endpoint with the highest score for this client.
    pub(super) fn kept(&self) -> Option<Candidate<'a>> {
        let client = seed(self.client.address);
        let mut best: Option<(usize, f64, Candidate<'a>)> = None;
        for (rank, candidate) in self.ranked() {
            let score = score(client, &candidate.workload.uid, candidate.workload.capacity);
            // In order of uid, so that of equal scores the first stands everywhere.
            if best.is_none_or(|(placed, highest, _)| rank > placed || (rank == placed && score > highest)) {
                best = Some((rank, score, candidate));
            }
        }
        best.map(|(_, _, candidate)| candidate)
    }
}

/// Weighted rendezvous: with `u` even in (0, 1), the highest of `capacity / -ln u` is each one's with a chance of its capacity
/// against all.
fn score(client: u64, uid: &str, capacity: u32) -> f64 {
    // 53 bits are what an f64 holds exactly; the half keeps it off both ends.
    let even = ((hash(client, uid.as_bytes()) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    f64::from(capacity) / -even.ln()
}

fn seed(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => hash(4, &v4.octets()),
        IpAddr::V6(v6) => hash(6, &v6.octets()),
    }
}

/// Part of the agreement between proxies: another function would move every client. Eight bytes at a time are mixed by a
/// multiplication and a shift, the end by the finalizer of MurmurHash3.
fn hash(seed: u64, bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = seed ^ (bytes.len() as u64).wrapping_mul(ODD);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        state = (state ^ u64::from_le_bytes(word)).wrapping_mul(ODD);
        state ^= state >> 32;
    }
    state = (state ^ (state >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    state = (state ^ (state >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    state ^ (state >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What proxies of every version agree on, worked out by another program. If this fails, every client of such services moves with the upgrade.
    #[test]
    fn the_agreement() {
        assert_eq!(seed("10.0.0.1".parse().unwrap()), seed("::ffff:10.0.0.1".parse().unwrap()));
        let known = [
            ("100.64.0.1", "Kubernetes//Pod/app/web-0", 0x7dd7_a7aa_73b0_729a),
            ("100.64.0.2", "Kubernetes//Pod/app/web-0", 0xde45_8cf3_7752_99e9),
            ("fd00::1", "Kubernetes//Pod/app/web-1", 0xfd5a_85ae_8650_2f00),
        ];
        for (client, uid, expected) in known {
            assert_eq!(hash(seed(client.parse().unwrap()), uid.as_bytes()), expected, "{client} {uid}");
        }
    }
}
