//! The address of a workload that is known by name only (Z42).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_model::dns::QueryFamily;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{NeedsDns, Resolved};
use culvert_model::service::IpFamilies;
use culvert_model::workload::Workload;

use crate::dns::{LookupError, Names, Upstream, ask, leads_back};
use crate::observe::Flow;
use crate::observe::flow::Failure;
use crate::pods::Pod;

/// Looks the name up through the pod's upstream DNS and goes on with one of its addresses, chosen at random. The family that
/// the application asked for comes first (Z72); the other is asked for only if there is nothing in the first.
pub async fn address(
    pod: &Arc<Pod>,
    source: &Workload,
    asked: SocketAddr,
    needed: NeedsDns,
    flow: &mut Flow,
) -> Result<Resolved, Failure> {
    let shared = &pod.shared;
    let name = needed.hostname.clone();
    let wanted =
        families(needed.service.as_ref().map_or(IpFamilies::Automatic, |s| s.ip_families), asked.ip());
    let question = |family| {
        let name = name.clone();
        async move {
            shared.observer.metrics.on_demand_dns.inc();
            let upstream = Upstream::new(shared.config.dns_upstream.clone().into(), pod.netns.clone());
            let circular = |server| leads_back(&shared.state.load(), source, server);
            ask(&upstream, &name, family, circular).await
        }
    };
    let found = first(&shared.names, &needed, wanted, question).await?;
    let chosen = found[fastrand::usize(..found.len())];
    let resolved = needed.with_address(chosen);
    if let Resolved::Tunnel(route) = &resolved {
        flow.tunnel = Some(route.peer);
    }
    Ok(resolved)
}

/// The addresses of the first family that has any.
async fn first<F>(
    names: &Names,
    needed: &NeedsDns,
    wanted: &[QueryFamily],
    question: impl Fn(QueryFamily) -> F,
) -> Result<Arc<[IpAddr]>, Failure>
where
    F: Future<Output = Result<crate::dns::Answer, String>>,
{
    let mut why = None;
    for &family in wanted {
        match names.addresses(needed.hostname.clone(), family, || question(family)).await {
            Ok(found) => return Ok(found),
            // That a server failed says more than that there is no address of the other family.
            Err(error @ LookupError::Failed(..)) => why = Some(error),
            Err(error) => why = why.or(Some(error)),
        }
    }
    let why = why.map_or_else(|| "no family to look up".to_owned(), |error| error.to_string());
    Err(Failure::new(Reason::Unreachable, format!("{}: {why}", needed.workload.uid)))
}

/// The families to ask for, in order.
fn families(of_service: IpFamilies, asked: IpAddr) -> &'static [QueryFamily] {
    use QueryFamily::{V4, V6};
    match (of_service, asked.to_canonical()) {
        (IpFamilies::V4, _) => &[V4],
        (IpFamilies::V6, _) => &[V6],
        (IpFamilies::Automatic | IpFamilies::Dual, IpAddr::V4(_)) => &[V4, V6],
        (IpFamilies::Automatic | IpFamilies::Dual, IpAddr::V6(_)) => &[V6, V4],
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use culvert_model::workload::TunnelProtocol;

    use super::*;
    use crate::dns::Answer;
    use crate::world::{service, workload};

    fn needed() -> NeedsDns {
        NeedsDns {
            hostname: "db.example".into(),
            port: 5432,
            workload: Arc::new(Workload {
                tunnel_protocol: TunnelProtocol::None,
                ..workload("shop", "db", &[])
            }),
            service: Some(Arc::new(service("shop/db.example", &["240.240.0.1"]))),
        }
    }

    /// Z72: a service's families bind; otherwise the application's comes first.
    #[test]
    fn which_families() {
        use QueryFamily::{V4, V6};
        let (v4, v6, mapped) = ("240.240.0.1", "2001:2::1", "::ffff:240.240.0.1");
        for (of_service, asked, expected) in [
            (IpFamilies::V4, v6, &[V4][..]),
            (IpFamilies::V6, v4, &[V6]),
            (IpFamilies::Automatic, v4, &[V4, V6]),
            (IpFamilies::Automatic, mapped, &[V4, V6]),
            (IpFamilies::Dual, v6, &[V6, V4]),
        ] {
            assert_eq!(families(of_service, asked.parse().unwrap()), expected, "{of_service:?} {asked}");
        }
    }

    /// What each family's servers say, and which were asked.
    async fn look(
        v4: Result<&'static str, &'static str>,
        v6: Result<&'static str, &'static str>,
    ) -> (Result<String, String>, Vec<QueryFamily>) {
        let asked = RefCell::new(Vec::new());
        let question = |family| {
            asked.borrow_mut().push(family);
            let said = if family == QueryFamily::V4 { v4 } else { v6 };
            async move {
                let addresses = said?.split_whitespace().map(|a| a.parse().unwrap()).collect();
                Ok(Answer { addresses, ttl: Duration::from_secs(30) })
            }
        };
        let wanted = families(IpFamilies::Automatic, "240.240.0.1".parse().unwrap());
        let found = first(&Names::default(), &needed(), wanted, question).await;
        (found.map(|found| found[0].to_string()).map_err(|f| f.to_string()), asked.into_inner())
    }

    /// Z42: the other family is asked only where the first has nothing; a name without any is unreachable, and says why.
    #[tokio::test]
    async fn one_family_after_the_other() {
        use QueryFamily::{V4, V6};
        assert_eq!(look(Ok("192.0.2.1"), Ok("2001:db8::1")).await, (Ok("192.0.2.1".into()), vec![V4]));
        assert_eq!(look(Ok(""), Ok("2001:db8::1")).await, (Ok("2001:db8::1".into()), vec![V4, V6]));
        assert_eq!(look(Err("servfail"), Ok("2001:db8::1")).await.0, Ok("2001:db8::1".into()));
        let (none, asked) = look(Ok(""), Ok("")).await;
        assert_eq!(asked, [V4, V6]);
        let none = none.unwrap_err();
        assert!(none.starts_with("unreachable: ") && none.contains("db.example has no address"), "{none}");
        let failed = look(Err("servfail"), Ok("")).await.0.unwrap_err();
        assert!(failed.contains("servfail"), "{failed}");
    }

    /// Z42: with an address it is a workload like any other.
    #[test]
    fn on_with_the_address() {
        let resolved = needed().with_address("192.0.2.1".parse().unwrap());
        let Resolved::Plain { destination, workload, service } = resolved else { panic!("{resolved:?}") };
        assert_eq!(destination, "192.0.2.1:5432".parse().unwrap());
        assert_eq!((&*workload.name, service.is_some()), ("db", true));
    }
}
