//! One pod: its sockets, its tunnels, its certificates, and what all pods share.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use culvert_identity::manager::CertificateManager;
use culvert_model::Str;
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::workload::Workload;
use culvert_net::netns::NetNs;
use culvert_net::socket::{
    DialOptions, ListenOptions, Reserve, arm_reset, bind_udp, canonical, listen_tcp, listen_tcp_any,
    migrate_when_closed,
};
use culvert_runtime::drain::{self, DrainTrigger, DrainWatcher};
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use futures_util::FutureExt;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::LocalPods;
use super::listen::accept;
use super::places::{Place, Places, PodPlaces};
use crate::config::{
    DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, PROXY_MARK, ProxyConfig, SOCKS_PORT, SOURCE_TIMEOUT,
};
use crate::dns::{DnsServer, DnsSockets, MAX_IN_FLIGHT, Upstream};
use crate::inbound;
use crate::observe::flow::Failure;
use crate::observe::{Direction, Flow, Observer};
use crate::outbound::{self, TunnelPool};
use crate::state::State;
use crate::tls::TlsConfigs;

/// What every pod of the process uses.
#[derive(Debug)]
pub struct Shared {
    /// Settings.
    pub config: ProxyConfig,
    /// What the control plane said.
    pub state: Arc<State>,
    /// Certificates of the node's pods.
    pub certificates: Arc<CertificateManager>,
    /// Addresses of workloads that are known by name.
    pub names: crate::dns::Names,
    /// What was seen of endpoints.
    pub endpoints: Arc<outbound::endpoints::EndpointTable>,
    /// Logs, metrics, live connections.
    pub observer: Observer,
    /// The threads that carry traffic.
    pub workers: Vec<Handle>,
    /// Whether the process may take traffic.
    pub readiness: Readiness,
    /// The process's drain.
    pub drain: DrainWatcher,
    /// Round robin over the workers.
    pub next_worker: AtomicUsize,
    /// The pods that are served, by workload.
    pub local: LocalPods,
    /// Connections that may be served at once. At about 10 KB each, idle, 200,000 hold 2 GB, and one pod's 50,000 hold 500 MB.
    pub places: Arc<Places>,
    /// For the moment when there are no more descriptors.
    pub reserve: Reserve,
}

/// Who a pod is, as the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    /// Its name.
    pub name: Str,
    /// Its namespace.
    pub namespace: Str,
    /// Its service account.
    pub service_account: Str,
    /// It ends tunnels itself (Z54): its inbound ports are its own.
    pub native_tunnel: bool,
}

/// One pod that is served.
#[derive(Debug)]
pub struct Pod {
    /// Who it is.
    pub info: PodInfo,
    /// Its workload's uid in the workload API (D08).
    pub workload_uid: Str,
    /// Its identity, from the agent and never from an address.
    pub identity: Identity,
    /// Tunnels to it end here, and not in the pod itself (Z54).
    pub terminated: bool,
    /// Its network namespace.
    pub netns: Arc<NetNs>,
    /// What all pods share.
    pub shared: Arc<Shared>,
    /// TLS configurations of its current certificate.
    pub tls: TlsConfigs,
    /// Tunnels, one pool a worker: a tunnel and the streams in it live on one thread.
    pub pools: Vec<TunnelPool>,
    /// Everything that runs for it.
    pub tasks: Tasks,
    /// Connections that it may have at once.
    pub places: Arc<PodPlaces>,
    /// DNS queries that it may have under way at once.
    pub dns_queries: Arc<Semaphore>,
    /// Its own drain, which the process's drain implies. What has to end before the pod counts as drained holds a watcher.
    drain: DrainTrigger,
}

/// The listeners of one pod.
struct Sockets {
    outbound: std::net::TcpListener,
    dns: DnsSockets,
    /// Not of a pod that ends tunnels itself.
    inbound: Option<InboundSockets>,
    /// Where SOCKS5 is switched on.
    socks: Option<std::net::TcpListener>,
}

struct InboundSockets {
    plaintext: std::net::TcpListener,
    hbone: std::net::TcpListener,
}

impl Pod {
    /// Opens the pod's sockets in its namespace and serves them.
    ///
    /// # Errors
    /// A socket that cannot be opened, or a name that makes no identity.
    pub fn start(shared: Arc<Shared>, info: PodInfo, netns: Arc<NetNs>) -> io::Result<Arc<Self>> {
        let invalid =
            |e: culvert_model::identity::ParseIdentityError| io::Error::new(io::ErrorKind::InvalidInput, e);
        let identity = Identity::new(
            shared.config.trust_domain.as_str(),
            info.namespace.clone(),
            info.service_account.clone(),
        )
        .map_err(invalid)?;
        let workload_uid: Str =
            format!("{}//Pod/{}/{}", shared.config.cluster_id, info.namespace, info.name).into();
        // Another agent than ours does not say it, and leaves it to the control plane.
        let native = info.native_tunnel
            || shared.state.load().workload_by_uid(&workload_uid).is_some_and(|it| it.native_tunnel);
        let sockets = netns.run(|| Sockets::open(&shared.config, !native))?;
        let (trigger, watcher) = shared.drain.child();
        let tasks = Tasks::new("pod");
        let pools = shared
            .workers
            .iter()
            .map(|worker| outbound::pool(worker.clone(), tasks.clone(), shared.config.pool_idle))
            .collect();
        let pod = Arc::new(Self {
            workload_uid,
            terminated: !native,
            tls: TlsConfigs::new(&shared.config),
            tasks,
            places: shared.places.pod(),
            dns_queries: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            info,
            identity,
            netns,
            shared,
            pools,
            drain: trigger,
        });
        pod.serve(sockets, &watcher);
        pod.prefetch();
        Ok(pod)
    }

    /// The pod's workload, as the control plane describes it; waits for it at first (Z30).
    pub async fn workload(&self) -> Option<Arc<Workload>> {
        self.shared.state.workload(&self.workload_uid, SOURCE_TIMEOUT).await
    }

    /// Listeners close, streams finish, what is left after the deadline is cut (Z08).
    pub async fn drain(&self, deadline: Duration) {
        let drained = self.drain.drain(deadline).await;
        tracing::debug!(pod = %self.workload_uid, ?drained, "drained");
        self.stop().await;
    }

    /// Everything stops now (Z12).
    pub async fn stop(&self) {
        self.drain.now();
        self.tasks.close();
        self.tasks.abort_all();
        let _ = self.tasks.wait(Duration::from_secs(1)).await;
    }

    /// A place for one more connection or stream, to hold while it goes on.
    ///
    /// # Errors
    /// A bound is reached; the failure names it.
    pub fn place(&self) -> Result<Place, Failure> {
        self.places
            .take()
            .map_err(|full| Failure::new(Reason::Overloaded, full.to_string()).beyond(full.limit()))
    }

    /// Counts and logs that a connection is refused, without work or waiting.
    pub fn refuse(&self, mut flow: Flow, failure: Failure) {
        let us = match flow.direction {
            Direction::Outbound => &mut flow.source,
            Direction::Inbound => &mut flow.destination,
        };
        us.identity = Some(self.identity.clone());
        us.workload = self.shared.state.load().workload_by_uid(&self.workload_uid).cloned();
        self.shared.observer.refuse(flow, failure);
    }

    /// How this pod's connections are dialled: the mark, so that they are not captured again (Z115), and the application's
    /// keepalive (Z114).
    pub fn dial_options(&self) -> DialOptions {
        let bounds = &self.shared.config.bounds;
        DialOptions {
            mark: Some(PROXY_MARK),
            source: None,
            nodelay: true,
            keepalive: Some(bounds.keepalive()),
            user_timeout: bounds.user_timeout(),
        }
    }

    /// For a connection or a stream to hold while it goes on.
    pub fn watcher(&self) -> DrainWatcher {
        self.drain.watcher().unwrap_or_else(drain::ended)
    }

    fn serve(self: &Arc<Self>, sockets: Sockets, watcher: &DrainWatcher) {
        let home = self.next_worker();
        let (outbound, inbound) = (Direction::Outbound, Direction::Inbound);
        self.listen((home, "outbound accept", outbound), watcher, sockets.outbound, outbound::serve);
        if let Some(InboundSockets { plaintext, hbone }) = sockets.inbound {
            self.listen((home, "plaintext accept", inbound), watcher, plaintext, inbound::serve_plaintext);
            self.listen((home, "hbone accept", inbound), watcher, hbone, inbound::serve_hbone);
        }
        if let Some(socks) = sockets.socks {
            self.listen((home, "socks accept", outbound), watcher, socks, outbound::serve_socks);
        }
        let dns = DnsServer::new(
            self.workload_uid.clone(),
            self.shared.state.clone(),
            Upstream::new(self.shared.config.dns_upstream.clone().into(), self.netns.clone()),
            self.shared.config.cluster_domain.as_str().into(),
            self.shared.observer.metrics.clone(),
            self.tasks.clone(),
            self.dns_queries.clone(),
        );
        self.tasks.spawn_on(&self.shared.workers[home], "dns", async move {
            if let Err(error) = dns.serve(sockets.dns) {
                tracing::error!(%error, "a pod's DNS cannot be served");
            }
        });
    }

    /// Has a certificate at hand before the first connection asks (Z90). Once the control plane names the workload, the
    /// authority knows the pod too; asking before that would be refused, and the next try would be late.
    fn prefetch(self: &Arc<Self>) {
        let pod = self.clone();
        self.tasks.spawn("certificate", async move {
            while pod.workload().await.is_none() {}
            if let Err(error) = pod.shared.certificates.prefetch(&pod.identity) {
                tracing::warn!(pod = %pod.workload_uid, %error, "no certificate ahead of need");
            }
        });
    }

    fn listen<S, F>(
        self: &Arc<Self>,
        (home, name, direction): (usize, &'static str, Direction),
        watcher: &DrainWatcher,
        listener: std::net::TcpListener,
        serve: S,
    ) where
        S: Fn(Arc<Self>, usize, std::net::TcpStream, SocketAddr) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let pod = self.clone();
        let drain = watcher.clone();
        self.tasks.spawn_on(&self.shared.workers[home], name, async move {
            accept(listener, drain, &pod.shared, |stream, peer| {
                let place = match pod.place() {
                    Ok(place) => place,
                    Err(failure) => {
                        let own = stream.local_addr().map_or(peer, canonical);
                        let _ = arm_reset(&stream);
                        drop(stream);
                        return pod.refuse(Flow::new(direction, peer, own), failure);
                    }
                };
                let worker = pod.next_worker();
                let runtime = &pod.shared.workers[worker];
                let served = serve(pod.clone(), worker, stream, peer);
                // Not an async block around it, which would be twice as large.
                pod.tasks.spawn_on(runtime, name, served.map(move |()| drop(place)));
            })
            .await;
        });
    }

    fn next_worker(&self) -> usize {
        self.shared.next_worker.fetch_add(1, Ordering::Relaxed) % self.shared.workers.len()
    }
}

impl Sockets {
    /// On the pod's own addresses, dual stack where the pod has IPv6 (Z116), shared with a proxy that is being replaced
    /// (Z10).
    fn open(config: &ProxyConfig, inbound: bool) -> io::Result<Self> {
        // The agent sets it too, and may where this process may not.
        if let Err(error) = migrate_when_closed() {
            tracing::debug!(%error, "what waits at a closing listener is not handed to the next");
        }
        let options = ListenOptions {
            mark: Some(PROXY_MARK),
            reuse_port: true,
            transparent: true,
            accepted: Some(config.bounds.keepalive()),
            user_timeout: config.bounds.user_timeout(),
            ..ListenOptions::default()
        };
        let mut dns = DnsSockets { udp: Vec::new(), tcp: Vec::new() };
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            let address = SocketAddr::new(ip, DNS_PORT);
            match (bind_udp(address, Some(PROXY_MARK)), listen_tcp(address, &options)) {
                (Ok(udp), Ok(tcp)) => {
                    dns.udp.push(udp);
                    dns.tcp.push(tcp);
                }
                // A pod may have IPv6 switched off.
                (Err(_), _) | (_, Err(_)) if ip.is_ipv6() => {}
                (Err(error), _) | (_, Err(error)) => return Err(error),
            }
        }
        let inbound = match inbound {
            true => Some(InboundSockets {
                plaintext: listen_tcp_any(INBOUND_PORT, &options)?,
                hbone: listen_tcp_any(HBONE_PORT, &options)?,
            }),
            false => None,
        };
        // IPv4 loopback only, as where it comes from.
        let socks = match config.socks5 {
            true => Some(listen_tcp((Ipv4Addr::LOCALHOST, SOCKS_PORT).into(), &options)?),
            false => None,
        };
        Ok(Self { outbound: listen_tcp_any(OUTBOUND_PORT, &options)?, dns, inbound, socks })
    }
}
