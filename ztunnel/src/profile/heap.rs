//! jemalloc's dump as a pprof profile.
//!
//! ```text
//! heap_v2/524288                          one sample for each so many bytes
//!   t*: 28: 56637 [0: 0]                  all threads: objects: bytes [accumulated]
//!   t3: ...
//! @ 0x5f86da8 0x5f5a1dc                   a stack, the innermost first, return addresses
//!   t*: 13: 6688 [0: 0]
//!   t3: ...
//!
//! MAPPED_LIBRARIES:
//! ```

use std::collections::HashMap;

use prost::Message;

use super::builder::{Builder, Frame};

/// The allocator's own functions, and the language's way into it, are at most so many.
const MAX_INSIDE: usize = 16;

/// The profile; none if the dump has no sample.
pub fn profile(dump: &str) -> Option<Vec<u8>> {
    let profile = convert(dump, &mut Names::default());
    backtrace::clear_symbol_cache();
    profile
}

fn convert(dump: &str, names: &mut Names) -> Option<Vec<u8>> {
    let (head, rest) = dump.split_once('\n')?;
    let period: i64 = head.strip_prefix("heap_v2/")?.trim().parse().ok().filter(|period| *period > 0)?;
    let mut builder = Builder::new(&[("inuse_objects", "count"), ("inuse_space", "bytes")]);
    builder.period("space", "bytes", period);
    let mut samples = 0;
    let mut stack = None;
    for line in rest.lines() {
        let line = line.trim();
        if line.starts_with("MAPPED_LIBRARIES") {
            break;
        } else if let Some(addresses) = line.strip_prefix('@') {
            stack = Some(addresses);
        } else if let Some(counts) = line.strip_prefix("t*:") {
            // The first one, before any stack, is the sum.
            if let (Some(addresses), Some((objects, bytes))) = (stack.take(), parse_counts(counts)) {
                let stack: Vec<_> = addresses
                    .split_whitespace()
                    .filter_map(|it| u64::from_str_radix(it.trim_start_matches("0x"), 16).ok())
                    .map(|address| (address, names.resolve(address)))
                    .collect();
                let inside = stack.iter().take(MAX_INSIDE).rposition(|(_, frames)| is_allocator(frames));
                let callers = stack.into_iter().skip(inside.map_or(0, |last| last + 1));
                let locations = callers.map(|(address, frames)| builder.location(address, frames)).collect();
                let (objects, bytes) = unsampled(objects, bytes, period);
                builder.sample(locations, vec![objects, bytes], ("", ""));
                samples += 1;
            }
        }
    }
    (samples > 0).then(|| builder.finish().encode_to_vec())
}

fn is_allocator(frames: &[Frame]) -> bool {
    let inside = ["_rjem_", "tikv_jemallocator", "__rust_alloc", "__rust_realloc", "alloc::alloc::"];
    frames.iter().any(|frame| inside.iter().any(|part| frame.function.contains(part)))
}

fn parse_counts(text: &str) -> Option<(i64, i64)> {
    let (objects, rest) = text.split_once(':')?;
    let bytes = rest.split_whitespace().next()?;
    Some((objects.trim().parse().ok()?, bytes.parse().ok()?)).filter(|(objects, _)| *objects > 0)
}

/// A sample stands for more than itself: an allocation of `s` bytes is sampled with probability `1 - exp(-s / period)`.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "an estimate")]
fn unsampled(objects: i64, bytes: i64, period: i64) -> (i64, i64) {
    let average = bytes as f64 / objects as f64;
    let scale = 1.0 / -(-average / period as f64).exp_m1();
    ((objects as f64 * scale) as i64, (bytes as f64 * scale) as i64)
}

/// Names of addresses, looked up once each.
#[derive(Default)]
struct Names(HashMap<u64, Vec<Frame>>);

impl Names {
    fn resolve(&mut self, address: u64) -> Vec<Frame> {
        let look_up = || {
            let mut frames = Vec::new();
            // Return addresses: the call is before them.
            let at =
                std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0).saturating_sub(1));
            backtrace::resolve(at, |symbol| {
                let file = symbol.filename().map(|file| file.display().to_string()).unwrap_or_default();
                let function =
                    symbol.name().map_or_else(|| format!("{address:#x}"), |name| format!("{name:#}"));
                frames.push(Frame { function, file, line: symbol.lineno().unwrap_or(0) });
            });
            frames
        };
        self.0.entry(address).or_insert_with(look_up).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::builder::Profile;
    use super::*;

    const DUMP: &str = "heap_v2/524288\n  t*: 3: 600 [0: 0]\n  t0: 3: 600 [0: 0]\n@ 0x10 0x20\n  t*: 2: 1048576 [0: 0]\n  t0: 2: 1048576 [0: 0]\n@ 0x10 0x30\n  t*: 0: 0 [0: 0]\n\nMAPPED_LIBRARIES:\n@ 0x1\n t*: 1: 1 [0: 0]\n";

    /// Z113.
    #[test]
    fn a_dump_becomes_a_profile() {
        let encoded = convert(DUMP, &mut Names::default()).unwrap();
        let profile = Profile::decode(&encoded[..]).unwrap();
        assert_eq!(profile.sample.len(), 1, "neither the sum, nor what is freed, nor the mappings");
        let sample = &profile.sample[0];
        // Two objects of 512 KiB: each is sampled with probability 1 - 1/e.
        assert_eq!((sample.value[0], sample.value[1] / 1024), (3, 1619));
        let addresses: Vec<u64> = profile.location.iter().map(|location| location.address).collect();
        assert_eq!((&sample.location_id[..], &addresses[..]), (&[1, 2][..], &[0x10, 0x20][..]));
        assert_eq!((profile.period, profile.string_table[0].as_str()), (524_288, ""));
        for empty in ["", "heap_v2/0\n", "heap_v2/1\n  t*: 0: 0 [0: 0]\n", "something else\n@ 0x1\n"] {
            assert!(convert(empty, &mut Names::default()).is_none(), "{empty:?}");
        }
    }
}
