//! Which endpoint of a service: chosen by [`culvert_model::balance`] from what the control plane says and from what was seen here.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use culvert_model::Str;
use culvert_model::address::{GatewayDestination, NamespacedHostname};
use culvert_model::balance::{Client, Observed, Place, pick};
use culvert_model::outcome::Reason;
use culvert_model::service::{IpFamilies, Service};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::{TunnelProtocol, Workload};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::HBONE_PORT;
use crate::shared::{Failure, Shared};
use crate::state::World;
use crate::target;
use crate::tls::Expected;

/// For so long an endpoint is avoided after connecting to it failed; each further failure in a row doubles it, five times at most.
const COOLDOWN: Duration = Duration::from_secs(1);
/// Endpoints that are remembered at once, about 100 bytes each. Beyond, those that are idle and well are forgotten.
const MAX_REMEMBERED: usize = 16_384;

/// One endpoint, as it is connected to.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// What it is.
    pub workload: Arc<Workload>,
    /// Its address and the port that the application listens on.
    pub address: Address,
    /// The service whose endpoint it is; `None` where the workload itself was addressed.
    pub service: Option<Arc<Service>>,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// There.
    At(SocketAddr),
    /// Where this name leads.
    Named(Str, u16),
}

impl Endpoint {
    /// Where to open a tunnel to it, and who must be there; `None` where plain TCP is spoken.
    pub fn tunnel(&self) -> Option<(SocketAddr, Expected)> {
        let Address::At(address) = &self.address else { return None };
        if self.workload.tunnel_protocol != TunnelProtocol::Hbone {
            return None;
        }
        let mut expected = Expected::new();
        expected.push(self.workload.identity.clone());
        expected.extend(self.service.iter().flat_map(|service| service.subject_alt_names.iter().cloned()));
        Some((SocketAddr::new(address.ip(), HBONE_PORT), expected))
    }

    /// The port that the application listens on.
    pub fn port(&self) -> u16 {
        match &self.address {
            Address::At(address) => address.port(),
            Address::Named(_, port) => *port,
        }
    }
}

/// A choice to be made.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Of this service.
    pub service: &'a NamespacedHostname,
    /// For this port of it.
    pub port: u16,
    /// For a client of this address.
    pub client: IpAddr,
    /// None of these workloads (uid): they failed already.
    pub exclude: &'a [Str],
}

/// Chooses.
///
/// # Errors
/// Why there is none.
pub fn choose(shared: &Shared, world: &World, wanted: &Wanted<'_>) -> Result<Endpoint, Failure> {
    let (key, snapshot) = (wanted.service, &world.snapshot);
    let place = world.place.as_ref().unwrap_or(&shared.place);
    let Some(service) = snapshot.service_by_key(key) else {
        return Err(Failure::new(Reason::NoHealthyUpstream, format!("service {key} is not known")));
    };
    if let Some(other) = other_waypoint(shared, snapshot, service) {
        let detail = format!(
            "service {key} is bound to another waypoint, {other}, which a backend is not sent through yet"
        );
        return Err(Failure::new(Reason::WaypointRequired, detail));
    }
    let fit = |workload: &Arc<Workload>| {
        let port = workload.services.get(key)?.target(wanted.port)?;
        (reachable(place, service, workload) && !wanted.exclude.contains(&workload.uid)).then_some(port)
    };
    let client = Client { place, address: wanted.client };
    let endpoints = snapshot.endpoints(key);
    let random = &mut |bound: u64| fastrand::u64(0..bound);
    match pick(&endpoints, &fit, &service.load_balancing, &client, &*shared.endpoints, random) {
        Some(found) => Ok(Endpoint {
            workload: found.workload.clone(),
            address: address(service, found.workload, found.target_port),
            service: Some(service.clone()),
        }),
        None if !service.ports.iter().any(|it| it.service_port == wanted.port) => {
            Err(Failure::new(Reason::UnknownPort, format!("{key} has no port {}", wanted.port)))
        }
        None => {
            let detail = format!(
                "{key} has {} endpoints, and none with port {} that is ready, reachable and not among the {} that failed",
                endpoints.total(),
                wanted.port,
                wanted.exclude.len()
            );
            Err(Failure::new(Reason::NoHealthyUpstream, detail))
        }
    }
}

/// The other waypoint that a service is bound to.
fn other_waypoint(shared: &Shared, snapshot: &Snapshot, service: &Service) -> Option<String> {
    let weighted = service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint);
    let mut bound = service.waypoint.as_deref().into_iter().chain(weighted).peekable();
    let first = *bound.peek()?;
    if bound.any(|waypoint| target::is_own(shared, snapshot, waypoint)) {
        return None;
    }
    Some(match &first.destination {
        GatewayDestination::Hostname(key) => key.to_string(),
        GatewayDestination::Address(address) => address.address.to_string(),
    })
}

fn reachable(place: &Place, service: &Service, workload: &Workload) -> bool {
    // Other networks, and sidecars' own mutual TLS, are not spoken here.
    workload.network == place.network
        && workload.tunnel_protocol != TunnelProtocol::LegacyIstioMtls
        && match workload.addresses.is_empty() {
            true => !workload.hostname.is_empty(),
            false => workload.addresses.iter().any(|address| allowed(service.ip_families, address)),
        }
}

fn allowed(families: IpFamilies, address: &IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::V4 => address.is_ipv4(),
        IpFamilies::V6 => address.is_ipv6(),
    }
}

fn address(service: &Service, workload: &Workload, port: u16) -> Address {
    match workload.addresses.iter().find(|address| allowed(service.ip_families, address)) {
        Some(address) => Address::At(SocketAddr::new(*address, port)),
        None => Address::Named(workload.hostname.clone(), port),
    }
}

/// What was seen of endpoints: requests and connections in progress, and where connecting failed a moment ago. All workers share
/// it.
#[derive(Debug, Default)]
pub struct Endpoints {
    seen: Mutex<HashMap<Str, Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    load: u32,
    failures: u32,
    avoid_until: Option<Instant>,
}

/// Something in progress at an endpoint, until it is dropped.
#[derive(Debug)]
pub struct InProgress {
    endpoints: Arc<Endpoints>,
    uid: Str,
}

impl Endpoints {
    /// A request or a connection begins.
    pub fn begin(self: &Arc<Self>, uid: &Str) -> InProgress {
        let mut seen = self.seen.lock();
        if seen.len() >= MAX_REMEMBERED {
            seen.retain(|_, it| it.load > 0 || it.failures > 0);
        }
        seen.entry(uid.clone()).or_default().load += 1;
        InProgress { endpoints: self.clone(), uid: uid.clone() }
    }

    /// Connecting failed.
    pub fn failed(&self, uid: &Str) {
        let mut seen = self.seen.lock();
        let it = seen.entry(uid.clone()).or_default();
        it.avoid_until = Some(Instant::now() + COOLDOWN * (1 << it.failures.min(5)));
        it.failures += 1;
    }

    /// Connecting succeeded: what failed before is forgotten.
    pub fn succeeded(&self, uid: &Str) {
        if let Some(it) = self.seen.lock().get_mut(uid) {
            it.failures = 0;
            it.avoid_until = None;
        }
    }

    /// The control plane says something new of these: failures of the past say nothing of them any more.
    pub fn changed<'a>(&self, uids: impl Iterator<Item = &'a Str>) {
        let mut seen = self.seen.lock();
        for uid in uids {
            if let Some(it) = seen.get_mut(uid) {
                it.failures = 0;
                it.avoid_until = None;
            }
        }
    }
}

impl Observed for Endpoints {
    fn load(&self, workload: &Workload) -> u32 {
        self.seen.lock().get(&workload.uid).map_or(0, |it| it.load)
    }

    fn cooling(&self, workload: &Workload, _port: u16) -> bool {
        let until = self.seen.lock().get(&workload.uid).and_then(|it| it.avoid_until);
        until.is_some_and(|until| Instant::now() < until)
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut seen = self.endpoints.seen.lock();
        if let Some(it) = seen.get_mut(&self.uid) {
            it.load = it.load.saturating_sub(1);
            if it.load == 0 && it.failures == 0 {
                seen.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_avoided_for_longer_each_time_until_it_succeeds() {
        let (table, uid) = (Arc::new(Endpoints::default()), Str::from("a"));
        let avoided =
            || table.seen.lock().get(&uid).and_then(|it| it.avoid_until).map(|it| it - Instant::now());
        table.failed(&uid);
        assert_eq!(avoided(), Some(COOLDOWN));
        table.failed(&uid);
        assert_eq!(avoided(), Some(2 * COOLDOWN));
        table.succeeded(&uid);
        assert_eq!(avoided(), None);
    }

    #[test]
    fn nothing_is_kept_of_what_is_over() {
        let (table, uid) = (Arc::new(Endpoints::default()), Str::from("a"));
        let (one, two) = (table.begin(&uid), table.begin(&uid));
        assert_eq!(table.seen.lock()[&uid].load, 2);
        drop((one, two));
        assert!(table.seen.lock().is_empty());
    }
}
