//! What a pod's annotations leave out of the mesh (C14). Pure.

use std::collections::BTreeSet;
use std::str::FromStr;

use culvert_k8s_api::labels;
use culvert_k8s_api::meta::StringMap;
use culvert_net::redirect::RedirectConfig;
use ipnet::IpNet;

/// Values of one annotation: four full ones, and the ports of probes, stay under `culvert_net::redirect::MAX_EXCLUSIONS`.
const MAX_VALUES: usize = 192;

/// Takes the annotations into `rules`. An annotation with anything wrong in it excludes nothing: what somebody meant to leave
/// out stays in the mesh, and the returned sentence says why.
pub fn apply(annotations: &StringMap, rules: &mut RedirectConfig) -> Option<String> {
    let mut problems = Vec::new();
    let read = |name: &str| annotations.get(name).map(|text| (name.to_owned(), text.clone()));
    if let Some((name, text)) = read(labels::EXCLUDE_OUTBOUND_PORTS) {
        rules.exclude_outbound_ports = ports(&text).unwrap_or_else(|why| refuse(&mut problems, &name, &why));
    }
    if let Some((name, text)) = read(labels::EXCLUDE_INBOUND_PORTS) {
        rules.exclude_inbound_ports = ports(&text).unwrap_or_else(|why| refuse(&mut problems, &name, &why));
    }
    if let Some((name, text)) = read(labels::EXCLUDE_OUTBOUND_CIDRS) {
        rules.exclude_outbound = networks(&text).unwrap_or_else(|why| refuse(&mut problems, &name, &why));
    }
    if let Some((name, text)) = read(labels::REROUTE_VIRTUAL_INTERFACES) {
        rules.virtual_interfaces = interfaces(&text).unwrap_or_else(|why| {
            problems.push(format!("annotation {name} has no effect: {why}"));
            BTreeSet::new()
        });
    }
    (!problems.is_empty()).then(|| problems.join("; "))
}

fn refuse<T: Default>(problems: &mut Vec<String>, name: &str, why: &str) -> T {
    problems.push(format!("annotation {name} excludes nothing: {why}"));
    T::default()
}

fn ports(text: &str) -> Result<BTreeSet<u16>, String> {
    let port = |value: &str| {
        // `u16` alone would take "+80" and "0080".
        let plain = !value.starts_with('0') && value.bytes().all(|b| b.is_ascii_digit());
        value.parse().ok().filter(|_| plain).ok_or_else(|| format!("{value:?} is not a port from 1 to 65535"))
    };
    Ok(values(text, port)?.into_iter().collect())
}

fn networks(text: &str) -> Result<Vec<IpNet>, String> {
    let network = |value: &str| {
        let net =
            IpNet::from_str(value).map_err(|_| format!("{value:?} is not a network such as 10.0.0.0/8"))?;
        match net.trunc() == net {
            true => Ok(net),
            false => Err(format!("{value:?} has bits beyond its prefix; {} is meant?", net.trunc())),
        }
    };
    let mut networks = values(text, network)?;
    // In one order, so that the same set written in another is no change.
    networks.sort();
    networks.dedup();
    Ok(networks)
}

/// Names as the kernel takes them (C13).
fn interfaces(text: &str) -> Result<BTreeSet<String>, String> {
    let interface = |value: &str| {
        let plain = (1..=15).contains(&value.len())
            && !matches!(value, "." | ".." | "lo")
            && value.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        plain.then(|| value.to_owned()).ok_or_else(|| format!("{value:?} is not an interface behind the pod"))
    };
    Ok(values(text, interface)?.into_iter().collect())
}

fn values<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let count = text.split(',').count();
    if count > MAX_VALUES {
        return Err(format!("{count} values are more than {MAX_VALUES}"));
    }
    text.split(',').map(|value| parse(value.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn applied(name: &str, value: &str) -> (RedirectConfig, Option<String>) {
        let mut rules = RedirectConfig::default();
        let problem = apply(&[(name.to_owned(), value.to_owned())].into_iter().collect(), &mut rules);
        (rules, problem)
    }

    /// C14, differently: what ambient has no annotation for.
    #[test]
    fn good_values_are_taken() {
        let (rules, problem) = applied(labels::EXCLUDE_OUTBOUND_PORTS, "443, 22,443");
        assert_eq!((rules.exclude_outbound_ports, problem), (BTreeSet::from([22, 443]), None));
        let (rules, problem) = applied(labels::EXCLUDE_INBOUND_PORTS, "9090");
        assert_eq!((rules.exclude_inbound_ports, problem), (BTreeSet::from([9090]), None));
        let (rules, problem) = applied(labels::EXCLUDE_OUTBOUND_CIDRS, "fd00::/8,10.0.0.0/8, 192.0.2.1/32");
        let nets: Vec<String> = rules.exclude_outbound.iter().map(ToString::to_string).collect();
        assert_eq!((nets.join(" "), problem), ("10.0.0.0/8 192.0.2.1/32 fd00::/8".to_owned(), None));
        assert_eq!(applied("culvert.dev/other", "x"), (RedirectConfig::default(), None));
    }

    /// C13.
    #[test]
    fn interfaces_behind_the_pod_are_named() {
        let (rules, problem) = applied(labels::REROUTE_VIRTUAL_INTERFACES, "tap0, docker0");
        assert_eq!(rules.virtual_interfaces, BTreeSet::from(["docker0".to_owned(), "tap0".to_owned()]));
        assert_eq!(problem, None);
        for wrong in ["", "lo", "tap0,", "a/b", "sixteen-bytes-xx", "tap 0"] {
            let (rules, problem) = applied(labels::REROUTE_VIRTUAL_INTERFACES, wrong);
            assert_eq!(rules, RedirectConfig::default(), "{wrong:?}");
            assert!(problem.is_some_and(|it| it.contains("no effect")), "{wrong:?}");
        }
    }

    #[test]
    fn one_wrong_value_excludes_nothing_and_is_named() {
        let many = vec!["1"; MAX_VALUES + 1].join(",");
        let ports = ["", "0", "65536", "80,", "80;81", "80-90", "+80", "080", "http", "80,x", &many];
        let cidrs = ["", "10.0.0.0", "10.0.0.1/8", "10.0.0.0/33", "*", "10.0.0.0/8,,", "fd00::1/64", "all"];
        let cases = [labels::EXCLUDE_OUTBOUND_PORTS, labels::EXCLUDE_INBOUND_PORTS]
            .into_iter()
            .flat_map(|name| ports.map(|value| (name, value)))
            .chain(cidrs.map(|value| (labels::EXCLUDE_OUTBOUND_CIDRS, value)));
        for (name, value) in cases {
            let (rules, problem) = applied(name, value);
            assert_eq!(rules, RedirectConfig::default(), "{name}: {value:?}");
            assert!(problem.is_some_and(|it| it.contains(name)), "{name}: {value:?}");
        }
    }

    #[test]
    fn a_wrong_annotation_does_not_take_a_good_one_with_it() {
        let both = [(labels::EXCLUDE_OUTBOUND_PORTS, "22"), (labels::EXCLUDE_INBOUND_PORTS, "all")];
        let mut rules = RedirectConfig::default();
        let problem =
            apply(&both.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect(), &mut rules);
        assert!(problem.unwrap().contains("exclude-inbound-ports"));
        assert_eq!(rules.exclude_outbound_ports, BTreeSet::from([22]));
        assert!(rules.exclude_inbound_ports.is_empty());
    }

    proptest! {
        /// Whatever is written, an excluded port was written, and a wrong annotation excludes none.
        #[test]
        fn nothing_is_excluded_that_was_not_written(text in "[0-9,. /a:+-]{0,40}") {
            let (rules, problem) = applied(labels::EXCLUDE_OUTBOUND_PORTS, &text);
            let written: Vec<&str> = text.split(',').map(str::trim).collect();
            for port in &rules.exclude_outbound_ports {
                prop_assert!(written.contains(&port.to_string().as_str()));
            }
            prop_assert_eq!(problem.is_some(), rules.exclude_outbound_ports.is_empty());
        }
    }
}
