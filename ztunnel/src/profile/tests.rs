//! Profiles of this test's own process.

use std::sync::atomic::{AtomicBool, Ordering};

use super::builder::Profile;
use super::*;

fn request(query: &[(&str, &str)]) -> AdminRequest {
    AdminRequest {
        method: http::Method::GET,
        path: String::new(),
        query: query.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
        headers: http::HeaderMap::new(),
        body: Default::default(),
    }
}

async fn profile(response: AdminResponse) -> Profile {
    use futures_util::FutureExt;
    let body = http_body_util::BodyExt::collect(response.into_body()).now_or_never().unwrap().unwrap();
    Profile::decode(body.to_bytes()).unwrap()
}

/// Names of the functions that samples are in themselves.
fn innermost(profile: &Profile) -> Vec<&str> {
    let place = |index: u64| usize::try_from(index).unwrap() - 1;
    let locations = profile.sample.iter().filter_map(|sample| sample.location_id.first());
    let lines = locations.filter_map(|id| profile.location[place(*id)].line.first());
    lines
        .map(|line| &profile.string_table[usize::try_from(profile.function[place(line.function_id)].name).unwrap()][..])
        .collect()
}

#[inline(never)]
fn a_function_that_is_busy(stop: &AtomicBool) -> u64 {
    let mut sum = 0u64;
    while !stop.load(Ordering::Relaxed) {
        sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
    }
    sum
}

/// Z113: what is busy is in the processor's profile by its name; two at once are refused, and so is a minute and more.
#[tokio::test]
async fn the_busy_function_is_in_the_profile() {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let busy = std::thread::spawn(move || a_function_that_is_busy(&seen));
    let one = Arc::new(Semaphore::new(1));
    let (first, second) = tokio::join!(
        cpu(request(&[("seconds", "1")]), one.clone()),
        cpu(request(&[("seconds", "1")]), one.clone())
    );
    stop.store(true, Ordering::Relaxed);
    busy.join().unwrap();
    assert_eq!(second.status(), StatusCode::CONFLICT);
    let profile = profile(first).await;
    assert!(profile.string_table.iter().any(|text| text.contains("a_function_that_is_busy")), "{profile:?}");
    assert_eq!((profile.sample_type.len(), profile.duration_nanos), (2, 1_000_000_000));
    assert!(
        !profile.string_table.iter().any(|text| is_sampler(text)),
        "the sampler is not what was asked for"
    );
    assert!(innermost(&profile).iter().any(|name| name.contains("a_function_that_is_busy")));
    for wrong in ["0", "61", "x"] {
        assert_eq!(cpu(request(&[("seconds", wrong)]), one.clone()).await.status(), StatusCode::BAD_REQUEST);
    }
}

/// Z113: heap sampling is in the binary and off; switched on, it shows by name who holds what.
#[tokio::test]
async fn the_heap_shows_who_holds_what() {
    assert!(culvert_net::heap::available() && !culvert_net::heap::active());
    let one = Arc::new(Semaphore::new(1));
    let response = held(one.clone()).await;
    assert_eq!(response.status(), StatusCode::CONFLICT, "nothing was sampled while it was off");
    assert_eq!(switch(&request(&[("active", "maybe")])).status(), StatusCode::BAD_REQUEST);
    assert_eq!(switch(&request(&[("active", "true")])).status(), StatusCode::OK);
    let kept = a_function_that_allocates();
    let profile = profile(held(one).await).await;
    assert_eq!(switch(&request(&[("active", "false")])).status(), StatusCode::OK);
    assert!(!culvert_net::heap::active());
    assert!(profile.string_table.iter().any(|text| text.contains("a_function_that_allocates")));
    assert!(!innermost(&profile).iter().any(|name| name.contains("prof_backtrace")), "nor is the allocator");
    let bytes: i64 = profile.sample.iter().map(|sample| sample.value[1]).sum();
    assert!(bytes > 16 << 20, "{bytes}");
    drop(kept);
}

#[inline(never)]
fn a_function_that_allocates() -> Vec<Vec<u8>> {
    (0..64).map(|_| std::hint::black_box(vec![1; 512 * 1024])).collect()
}
