use proptest::prelude::*;
use tokio::time::advance;

use super::*;
use crate::world::workload;

fn pod(name: &str) -> Workload {
    workload("shop", name, &["100.64.2.1"])
}

fn table() -> Arc<EndpointTable> {
    Arc::default()
}

/// Load is what is in progress, and nothing stays behind.
#[test]
fn connections_are_counted_while_they_last() {
    let (table, a, b) = (table(), pod("a"), pod("b"));
    let first = table.begin(&a.uid);
    let second = table.begin(&a.uid);
    assert_eq!((table.load(&a), table.load(&b)), (2, 0));
    drop(first);
    assert_eq!((table.load(&a), table.sizes()), (1, (1, 0)));
    drop(second);
    assert_eq!((table.load(&a), table.sizes()), (0, (0, 0)));
}

/// A pod that goes and comes back under its name (a StatefulSet's) begins without load, and what ends later is not its.
#[test]
fn a_successor_begins_anew() {
    let (table, a) = (table(), pod("a"));
    let old = table.begin(&a.uid);
    table.changed([(&a.uid, true)].into_iter());
    assert_eq!((table.load(&a), table.sizes()), (0, (0, 0)));
    let new = table.begin(&a.uid);
    drop(old);
    assert_eq!(table.load(&a), 1);
    table.changed([(&a.uid, false)].into_iter());
    assert_eq!(table.load(&a), 1, "an update is no end");
    drop(new);
    assert_eq!(table.sizes(), (0, 0));
}

proptest! {
    /// Whatever begins, ends and goes, a counter is the number of this era's connections.
    #[test]
    fn counted_as_a_list_would(steps in prop::collection::vec((0_u8..3, 0_usize..4), 0..200)) {
        let table = table();
        let pods: Vec<_> = (0..4).map(|i| pod(&i.to_string())).collect();
        let mut open: Vec<(usize, bool, InProgress)> = Vec::new();
        for (what, which) in steps {
            match what {
                0 => open.push((which, true, table.begin(&pods[which].uid))),
                1 if !open.is_empty() => {
                    open.remove(which % open.len());
                }
                1 => {}
                _ => {
                    table.changed([(&pods[which].uid, true)].into_iter());
                    open.iter_mut().filter(|(of, ..)| *of == which).for_each(|(_, counts, _)| *counts = false);
                }
            }
            for (which, pod) in pods.iter().enumerate() {
                let expected = open.iter().filter(|(of, counts, _)| *of == which && *counts).count();
                prop_assert_eq!(table.load(pod) as usize, expected);
            }
        }
        drop(open);
        prop_assert_eq!(table.sizes(), (0, 0));
    }
}

/// Z45 differs: avoided for a second, then for twice as long each time, up to a bound; a success ends it.
#[tokio::test(start_paused = true)]
async fn a_cooldown_grows_and_ends() {
    let (table, a) = (table(), pod("a"));
    let mut expected = FIRST_COOLDOWN;
    for _ in 0..8 {
        assert_eq!(table.failed(&a.uid, 8080), Some(expected));
        assert_eq!(table.failed(&a.uid, 8080), None, "one that began earlier does not make it longer");
        advance(expected - Duration::from_millis(1)).await;
        assert!(table.cooling(&a, 8080));
        advance(Duration::from_millis(2)).await;
        assert!(!table.cooling(&a, 8080));
        expected = (expected * 2).min(LONGEST_COOLDOWN);
    }
    assert_eq!(expected, LONGEST_COOLDOWN);
    table.succeeded(&a.uid, 8080);
    assert_eq!((table.failed(&a.uid, 8080), table.sizes()), (Some(FIRST_COOLDOWN), (0, 1)));
}

/// It is one port of one workload that failed.
#[tokio::test(start_paused = true)]
async fn a_port_by_itself() {
    let (table, a, b) = (table(), pod("a"), pod("b"));
    table.failed(&a.uid, 8080);
    assert!(table.cooling(&a, 8080) && !table.cooling(&a, 9090) && !table.cooling(&b, 8080));
    table.succeeded(&a.uid, 9090);
    assert!(table.cooling(&a, 8080));
    table.changed([(&b.uid, false)].into_iter());
    assert!(table.cooling(&a, 8080));
    table.changed([(&a.uid, false)].into_iter());
    assert!(!table.cooling(&a, 8080), "a workload that changed is tried again");
    assert_eq!(table.sizes(), (0, 0));
}

/// What was long ago is the past: the next failure is the first, and its entry is swept away.
#[tokio::test(start_paused = true)]
async fn the_past_is_forgotten() {
    let (table, a, b) = (table(), pod("a"), pod("b"));
    table.failed(&a.uid, 1);
    advance(FIRST_COOLDOWN).await;
    assert_eq!(table.failed(&a.uid, 1), Some(FIRST_COOLDOWN * 2));
    advance(FIRST_COOLDOWN * 2 + LONGEST_COOLDOWN).await;
    assert!(!table.cooling(&b, 1));
    assert_eq!(table.sizes(), (0, 0));
    assert_eq!(table.failed(&a.uid, 1), Some(FIRST_COOLDOWN));
}

/// The bound: beyond it failures are not remembered, until there is room again.
#[tokio::test(start_paused = true)]
async fn no_more_than_so_many() {
    let table = table();
    let uids: Vec<Str> = (0..=MAX_COOLING).map(|i| i.to_string().into()).collect();
    for uid in &uids[..MAX_COOLING] {
        assert!(table.failed(uid, 1).is_some());
    }
    assert_eq!((table.failed(&uids[MAX_COOLING], 1), table.sizes()), (None, (0, MAX_COOLING)));
    advance(FIRST_COOLDOWN + LONGEST_COOLDOWN).await;
    assert_eq!((table.failed(&uids[MAX_COOLING], 1), table.sizes()), (Some(FIRST_COOLDOWN), (0, 1)));
}
