//! Profiles of the running process, in the form that `go tool pprof` and its kin open (Z113).
//!
//! `GET /debug/pprof/profile?seconds=N` samples the processor's time of all threads 99 times a second of it.
//! `POST /debug/pprof/heap?active=true` begins to sample allocations, `GET /debug/pprof/heap` shows what of them is held now,
//! `?active=false` ends it. Names are resolved here, so that a profile needs no binary beside it; that costs some hundred
//! milliseconds of one core, on a thread of its own, and is paid only by who asks.

mod builder;
mod heap;

use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::admin::{AdminRequest, AdminResponse, AdminServer, text};
use http::StatusCode;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};
use prost::Message;
use tokio::sync::Semaphore;

use builder::{Builder, Frame};

/// Samples for each second of processor time. Not 100, so as not to beat with what happens every 10 ms.
const FREQUENCY: i32 = 99;
/// Seconds sampled when nobody says.
const DEFAULT_SECONDS: u64 = 10;
/// Longest sampling: 60 s at 99 Hz on 64 cores are 380,000 samples, kept in tables of fixed size.
const MAX_SECONDS: u64 = 60;
/// Where stacks are not walked: their code may hold a lock that walking needs.
const NOT_WALKED: [&str; 4] = ["libc", "libgcc", "pthread", "vdso"];

/// Adds the pages. One profile at a time.
#[must_use]
pub fn routes(server: AdminServer) -> AdminServer {
    let one = Arc::new(Semaphore::new(1));
    let (cpu_one, heap_one) = (one.clone(), one);
    server
        .route(
            "GET",
            "/debug/pprof/profile",
            "processor profile for pprof; ?seconds=10, at most 60",
            move |request| cpu(request, cpu_one.clone()),
        )
        .route(
            "GET",
            "/debug/pprof/heap",
            "heap profile for pprof; first POST with ?active=true",
            move |_| held(heap_one.clone()),
        )
        .route("POST", "/debug/pprof/heap", "", move |request| std::future::ready(switch(&request)))
}

async fn cpu(request: AdminRequest, one: Arc<Semaphore>) -> AdminResponse {
    let seconds = match request.query("seconds").map(str::parse::<u64>) {
        None => DEFAULT_SECONDS,
        Some(Ok(seconds @ 1..=MAX_SECONDS)) => seconds,
        Some(_) => return text(StatusCode::BAD_REQUEST, format!("want ?seconds=1 to {MAX_SECONDS}\n")),
    };
    let Ok(_turn) = one.try_acquire() else { return busy() };
    let guard =
        match pprof::ProfilerGuardBuilder::default().frequency(FREQUENCY).blocklist(&NOT_WALKED).build() {
            Ok(guard) => guard,
            Err(error) => return failed("cannot sample", &error),
        };
    // A client that goes away drops this future, and the guard with it: sampling ends.
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let built = tokio::task::spawn_blocking(move || {
        guard.report().build().map(|report| cpu_profile(&report, seconds))
    });
    match built.await {
        Ok(Ok(profile)) => attachment("cpu.pb", profile),
        Ok(Err(error)) => failed("no report", &error),
        Err(error) => failed("no report", &error),
    }
}

fn cpu_profile(report: &pprof::Report, seconds: u64) -> Vec<u8> {
    let mut builder = Builder::new(&[("samples", "count"), ("cpu", "nanoseconds")]);
    let period = 1_000_000_000 / i64::from(FREQUENCY);
    builder.period("cpu", "nanoseconds", period);
    builder.duration(Duration::from_secs(seconds));
    for (stack, count) in &report.data {
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        // Inlined functions of one address, the innermost first, are one location.
        let own = |symbols: &&Vec<pprof::Symbol>| symbols.iter().any(|symbol| is_sampler(&symbol.name()));
        let locations: Vec<u64> = stack
            .frames
            .iter()
            .skip_while(own)
            .map(|symbols| {
                let frames = symbols.iter().map(|symbol| Frame {
                    function: symbol.name(),
                    file: symbol.filename().into_owned(),
                    line: symbol.lineno.unwrap_or(0),
                });
                builder.location(0, frames.collect())
            })
            .collect();
        builder.sample(locations, vec![count, count.saturating_mul(period)], ("thread", &stack.thread_name));
    }
    builder.finish().encode_to_vec()
}

/// The innermost functions of every stack are those that took it.
fn is_sampler(function: &str) -> bool {
    ["backtrace::backtrace", "pprof::"].iter().any(|part| function.contains(part))
}

async fn held(one: Arc<Semaphore>) -> AdminResponse {
    if !culvert_net::heap::available() {
        return text(StatusCode::NOT_IMPLEMENTED, "the allocator of this program cannot sample\n");
    }
    let Ok(_turn) = one.try_acquire() else { return busy() };
    let built =
        tokio::task::spawn_blocking(|| culvert_net::heap::dump().map(|dump| heap::profile(&dump))).await;
    match built {
        Ok(Ok(Some(profile))) => attachment("heap.pb", profile),
        Ok(Ok(None)) if culvert_net::heap::active() => {
            text(StatusCode::CONFLICT, "nothing has been sampled yet; ask again later\n")
        }
        Ok(Ok(None)) => {
            text(StatusCode::CONFLICT, "not sampling: POST /debug/pprof/heap?active=true first\n")
        }
        Ok(Err(error)) => failed("no dump", &error),
        Err(error) => failed("no dump", &error),
    }
}

fn switch(request: &AdminRequest) -> AdminResponse {
    let active = match request.query("active") {
        Some("true") => true,
        Some("false") => false,
        _ => return text(StatusCode::BAD_REQUEST, "want ?active=true or ?active=false\n"),
    };
    match culvert_net::heap::set_active(active) {
        Ok(()) => text(StatusCode::OK, if active { "sampling\n" } else { "not sampling\n" }),
        Err(error) => failed("cannot sample", &error),
    }
}

fn busy() -> AdminResponse {
    text(StatusCode::CONFLICT, "another profile is being made\n")
}

fn failed(what: &str, error: &dyn std::error::Error) -> AdminResponse {
    text(StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: {error}\n"))
}

fn attachment(name: &str, body: Vec<u8>) -> AdminResponse {
    let mut response = text(StatusCode::OK, body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename={name}")) {
        headers.insert(CONTENT_DISPOSITION, value);
    }
    response
}

#[cfg(test)]
#[path = "profile/tests.rs"]
mod tests;
