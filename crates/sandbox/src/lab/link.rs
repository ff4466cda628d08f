//! Links, addresses and routes, set by netlink from inside a namespace.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::{InfoData, InfoVeth};
use netlink_packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::LabError;
use super::netns::NetNs;

/// One end of a veth pair still to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub ns: &'a NetNs,
    pub name: &'a str,
}

/// A netlink conversation inside one namespace.
#[derive(Debug)]
pub(super) struct Link {
    handle: Handle,
}

/// Opens a netlink socket inside `ns`, lets `work` use it, and closes it.
pub(super) fn within<T: Send>(
    ns: &NetNs,
    work: impl AsyncFnOnce(&Link) -> Result<T, LabError> + Send,
) -> Result<T, LabError> {
    ns.run(|| {
        let failed = |source| LabError::Socket { path: ns.path().to_owned(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
            let link = Link { handle };
            tokio::select! {
                outcome = work(&link) => outcome,
                () = connection => Err(failed(std::io::ErrorKind::ConnectionAborted.into())),
            }
        })
    })?
}

/// Writes network settings of `ns` (`/proc/sys/net` shows the namespace of the thread that opens it).
pub(super) fn sysctl(ns: &NetNs, settings: &[(&str, &str)]) -> Result<(), LabError> {
    ns.run(|| {
        settings.iter().try_for_each(|(key, value)| {
            fs::write(format!("/proc/sys/net/{key}"), value)
                .map_err(|source| LabError::Sysctl { key: (*key).to_owned(), source })
        })
    })?
}

impl Link {
    pub(super) async fn bridge(&self, name: &str) -> Result<(), LabError> {
        // Snooping without a querier drops neighbour discovery after a few minutes: off.
        let message = LinkBridge::new(name).mcast_snooping(false).up().build();
        self.handle.link().add(message).execute().await.map_err(failed("add bridge", name))
    }

    /// Makes a veth pair: `near` in this namespace, `far` in its own, both named at once.
    pub(super) async fn veth(&self, near: &str, far: End<'_>) -> Result<(), LabError> {
        let ns = File::open(far.ns.path())
            .map_err(|source| LabError::Socket { path: far.ns.path().to_owned(), source })?;
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(far.name.to_owned())
            .setns_by_fd(ns.as_raw_fd())
            .build();
        let message =
            LinkVeth::new(near, "peer").set_info_data(InfoData::Veth(InfoVeth::Peer(peer))).up().build();
        self.handle.link().add(message).execute().await.map_err(failed("add veth", near))
    }

    pub(super) async fn up(&self, name: &str) -> Result<(), LabError> {
        let message = LinkUnspec::new_with_index(self.index(name).await?).up().build();
        self.handle.link().set(message).execute().await.map_err(failed("set up", name))
    }

    pub(super) async fn enslave(&self, name: &str, bridge: &str) -> Result<(), LabError> {
        let controller = self.index(bridge).await?;
        let message = LinkUnspec::new_with_index(self.index(name).await?).controller(controller).up().build();
        self.handle.link().set(message).execute().await.map_err(failed("enslave", name))
    }

    /// Deletes a link; one that is not there is no error.
    pub(super) async fn delete(&self, name: &str) -> Result<(), LabError> {
        let Ok(index) = self.index(name).await else { return Ok(()) };
        self.handle.link().del(index).execute().await.map_err(failed("delete", name))
    }

    /// Adds an address, usable at once: duplicate address detection has nobody to find here and would cost a second.
    pub(super) async fn address(&self, name: &str, address: IpAddr, prefix: u8) -> Result<(), LabError> {
        let index = self.index(name).await?;
        let mut request = self.handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.map_err(failed("add address to", name))
    }

    /// `destination dev name`, with `source` as the preferred source address.
    pub(super) async fn on_link(
        &self,
        name: &str,
        destination: IpNet,
        source: Option<IpAddr>,
    ) -> Result<(), LabError> {
        let mut route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination.addr(), destination.prefix_len())
            .and_then(|route| match source {
                Some(source) => route.pref_source(source),
                None => Ok(route),
            })
            .expect("plan addresses are of one family")
            .output_interface(self.index(name).await?);
        if destination.addr().is_ipv4() {
            route = route.scope(RouteScope::Link);
        }
        self.handle.route().add(route.build()).replace().execute().await.map_err(failed("add route to", name))
    }

    /// `destination via gateway dev name`; the gateway is taken to be on the link.
    pub(super) async fn via(&self, name: &str, destination: IpNet, gateway: IpAddr) -> Result<(), LabError> {
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination.addr(), destination.prefix_len())
            .and_then(|route| route.gateway(gateway))
            .expect("plan addresses are of one family")
            .output_interface(self.index(name).await?)
            .onlink();
        self.handle
            .route()
            .add(route.build())
            .replace()
            .execute()
            .await
            .map_err(failed("add route via", name))
    }

    async fn index(&self, name: &str) -> Result<u32, LabError> {
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        let link = found.try_next().await.map_err(failed("find", name))?;
        Ok(link.ok_or_else(|| LabError::NoLink { name: name.to_owned() })?.header.index)
    }
}

fn failed<'a>(what: &'static str, name: &'a str) -> impl FnOnce(rtnetlink::Error) -> LabError + 'a {
    move |source| LabError::Netlink { what, name: name.to_owned(), source: Box::new(source) }
}
