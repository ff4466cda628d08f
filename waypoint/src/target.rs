//! What a CONNECT request asks for, and whether this waypoint serves it (W15, W17).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_model::address::{GatewayAddress, GatewayDestination, NetworkAddress};
use culvert_model::outcome::Reason;
use culvert_model::service::Service;
use culvert_model::snapshot::{Destination, Snapshot};
use culvert_model::workload::{AppProtocol, Workload};

use crate::shared::{Failure, Shared};

/// What was asked for.
#[derive(Clone, Debug)]
pub enum Target {
    /// A port of a service.
    Service(Arc<Service>, u16),
    /// A workload by its address.
    Workload(Arc<Workload>, SocketAddr),
}

impl Target {
    /// The port asked for.
    pub fn port(&self) -> u16 {
        match self {
            Self::Service(_, port) => *port,
            Self::Workload(_, address) => address.port(),
        }
    }

    /// The service, if one was asked for.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Service(service, _) => Some(service),
            Self::Workload(..) => None,
        }
    }

    /// What is spoken there.
    pub fn protocol(&self) -> AppProtocol {
        match self {
            Self::Service(service, port) => service_protocol(service, *port),
            Self::Workload(workload, address) => {
                let ports = workload.services.iter().flat_map(|(_, ports)| &ports.0);
                let mut declared =
                    ports.filter(|it| it.target_port == address.port()).map(|it| it.app_protocol);
                let first = declared.next().unwrap_or(AppProtocol::Unknown);
                // Services that say different things of one port say nothing.
                if declared.all(|it| it == first) { first } else { AppProtocol::Unknown }
            }
        }
    }

    /// As it is now, if it is still there and still served here.
    ///
    /// # Errors
    /// It is not.
    pub fn current(&self, shared: &Shared, snapshot: &Snapshot) -> Result<Self, Failure> {
        let gone = |what: &dyn std::fmt::Display| {
            Failure::new(Reason::WrongDestination, format!("{what} is no longer known"))
        };
        let now = match self {
            Self::Service(service, port) => {
                let now = snapshot.service_by_key(&service.key).ok_or_else(|| gone(&service.key))?;
                Self::Service(now.clone(), *port)
            }
            Self::Workload(workload, address) => {
                let now = snapshot.workload_by_uid(&workload.uid).ok_or_else(|| gone(&workload.uid))?;
                // Of a pod that was made again under the same uid, as of a StatefulSet, the address may be another's by now.
                if !now.addresses.contains(&address.ip()) {
                    return Err(gone(address));
                }
                Self::Workload(now.clone(), *address)
            }
        };
        now.bound(shared, snapshot)?;
        Ok(now)
    }

    /// Whether it is bound to this waypoint.
    fn bound(&self, shared: &Shared, snapshot: &Snapshot) -> Result<(), Failure> {
        let (name, waypoints) = match self {
            Self::Service(service, _) => {
                let weighted = service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint);
                let all: Vec<_> = service.waypoint.as_deref().into_iter().chain(weighted).collect();
                (service.key.to_string(), all)
            }
            Self::Workload(workload, _) => {
                (workload.uid.to_string(), workload.waypoint.as_deref().into_iter().collect())
            }
        };
        if waypoints.iter().any(|waypoint| is_own(shared, snapshot, waypoint)) {
            return Ok(());
        }
        Err(Failure::new(Reason::WrongDestination, format!("{name} is not bound to waypoint {}", shared.own)))
    }
}

/// What a service says is spoken at a port of it.
pub fn service_protocol(service: &Service, port: u16) -> AppProtocol {
    let found = service.ports.iter().find(|it| it.service_port == port);
    found.map_or(AppProtocol::Unknown, |it| it.app_protocol)
}

/// Whether a gateway's address is this waypoint: by the name of its service, or by an address of that or of its own pod.
pub fn is_own(shared: &Shared, snapshot: &Snapshot, gateway: &GatewayAddress) -> bool {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => *key == shared.own,
        GatewayDestination::Address(address) => {
            if address.network == shared.place.network && address.address == shared.config.instance_ip {
                return true;
            }
            let found = snapshot.destination(address, &shared.own.namespace);
            matches!(found, Destination::Service(service) if service.key == shared.own)
        }
    }
}

/// What `host:port` means to a client of this namespace.
///
/// # Errors
/// It is not known, or not served here.
pub fn find(
    shared: &Shared,
    snapshot: &Snapshot,
    (host, port): (&str, u16),
    namespace: &str,
) -> Result<Target, Failure> {
    let unknown = || Failure::new(Reason::WrongDestination, format!("{host}:{port} is not known"));
    let target = match host.parse::<IpAddr>() {
        Ok(ip) => {
            let ip = ip.to_canonical();
            let address = NetworkAddress { network: shared.place.network.clone(), address: ip };
            match snapshot.destination(&address, namespace) {
                Destination::Service(service) => Target::Service(service.clone(), port),
                Destination::Workload(workload) => {
                    Target::Workload(workload.clone(), SocketAddr::new(ip, port))
                }
                Destination::Unknown => return Err(unknown()),
            }
        }
        Err(_) => {
            let host = host.trim_end_matches('.').to_ascii_lowercase();
            let service = snapshot.service_by_hostname(&host, namespace).ok_or_else(unknown)?;
            Target::Service(service.clone(), port)
        }
    };
    target.bound(shared, snapshot)?;
    if let Target::Service(service, port) = &target
        && !service.ports.iter().any(|it| it.service_port == *port)
    {
        return Err(Failure::new(Reason::UnknownPort, format!("{} has no port {port}", service.key)));
    }
    Ok(target)
}
