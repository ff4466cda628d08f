//! Settings of the proxy's bounds and of its sockets (docs/operations/limits.md).

use std::time::Duration;

use culvert_hbone::copy::IdleLimits;
use culvert_net::socket::Keepalive;

/// How much is served at once, and how long what stands still is kept. A duration of `0s` is for ever.
#[derive(Clone, Debug, clap::Args)]
pub struct Bounds {
    /// Connections of all pods at once; fewer where the limit of open files does not hold two for each.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 200_000)]
    pub max_connections: usize,
    /// Connections of one pod at once; at most half of those of all.
    #[arg(long, env = "MAX_POD_CONNECTIONS", default_value_t = 50_000)]
    pub max_pod_connections: usize,
    /// Connections on which nothing moves are reset after this long; 0s is never.
    #[arg(long, env = "IDLE_TIMEOUT", default_value = "0s", value_parser = duration)]
    pub idle_timeout: Duration,
    /// Connections of which one side has ended and on which nothing moves are reset after this long; 0s is never.
    #[arg(long, env = "HALF_CLOSED_TIMEOUT", default_value = "1h", value_parser = duration)]
    pub half_closed_timeout: Duration,
    /// Connections to an application are given up when what was sent stays unacknowledged this long; 0s leaves it to the
    /// kernel.
    #[arg(long, env = "TCP_USER_TIMEOUT", default_value = "0s", value_parser = duration)]
    pub tcp_user_timeout: Duration,
    /// Silence of an application's connection before the first TCP keepalive probe, in whole seconds.
    #[arg(long, env = "KEEPALIVE_TIME", default_value = "180s", value_parser = probe)]
    pub keepalive_time: Duration,
    /// Between probes, in whole seconds.
    #[arg(long, env = "KEEPALIVE_INTERVAL", default_value = "180s", value_parser = probe)]
    pub keepalive_interval: Duration,
    /// Unanswered probes before the connection is given up.
    #[arg(long, env = "KEEPALIVE_RETRIES", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=127))]
    pub keepalive_retries: u32,
}

impl Bounds {
    /// How long a connection may stand still.
    pub fn idle(&self) -> IdleLimits {
        IdleLimits { open: some(self.idle_timeout), half_closed: some(self.half_closed_timeout) }
    }

    /// How a dead application is noticed (Z114).
    pub fn keepalive(&self) -> Keepalive {
        Keepalive {
            idle: self.keepalive_time,
            interval: self.keepalive_interval,
            count: self.keepalive_retries,
        }
    }

    /// How long sent bytes may stay unacknowledged; `None` is the kernel's business (Z114).
    pub fn user_timeout(&self) -> Option<Duration> {
        some(self.tcp_user_timeout)
    }
}

fn some(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

fn duration(text: &str) -> Result<Duration, String> {
    culvert_runtime::units::parse_duration(text).map_err(|e| e.to_string())
}

/// What the kernel takes: tcp(7), `TCP_KEEPIDLE`.
fn probe(text: &str) -> Result<Duration, String> {
    let probe = duration(text)?;
    if probe.subsec_nanos() == 0 && (1..=32_767).contains(&probe.as_secs()) {
        return Ok(probe);
    }
    Err(format!("{text}: not 1 to 32767 whole seconds"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Settings {
        #[command(flatten)]
        bounds: Bounds,
    }

    fn parse(arguments: &[&str]) -> Result<Bounds, clap::Error> {
        Settings::try_parse_from(std::iter::once(&"ztunnel").chain(arguments)).map(|settings| settings.bounds)
    }

    /// Z114: what is asked of the kernel by default; and that TCP's own patience is the default everywhere else.
    #[test]
    fn defaults() {
        let bounds = parse(&[]).unwrap();
        let probes = Duration::from_secs(180);
        assert_eq!(bounds.keepalive(), Keepalive { idle: probes, interval: probes, count: 9 });
        assert_eq!(bounds.user_timeout(), None);
        assert_eq!(bounds.idle(), IdleLimits { open: None, half_closed: Some(Duration::from_secs(3600)) });
    }

    #[test]
    fn values() {
        let bounds =
            parse(&["--idle-timeout=5m", "--half-closed-timeout=0s", "--tcp-user-timeout=30s"]).unwrap();
        let idle = IdleLimits { open: Some(Duration::from_secs(300)), half_closed: None };
        assert_eq!((bounds.idle(), bounds.user_timeout()), (idle, Some(Duration::from_secs(30))));
        for wrong in [
            "--keepalive-time=0s",
            "--keepalive-time=500ms",
            "--keepalive-interval=10h",
            "--keepalive-retries=0",
        ] {
            assert!(parse(&[wrong]).is_err(), "{wrong}");
        }
    }
}
