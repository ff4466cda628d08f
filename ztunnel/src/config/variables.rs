//! Variables of ambient that are not one setting under its own name (Z118): other names, families of variables, and
//! `PROXY_CONFIG`.

use std::collections::BTreeMap;

use culvert_runtime::config::{ConfigError, ConfigErrors, Environment, Layer, nearest, parse_yaml};
use serde_json::{Map, Value};

const PROXY_CONFIG: &str = "PROXY_CONFIG";
const META: &str = "ISTIO_META_";
const META_JSON: &str = "ISTIO_METAJSON_";

/// Ambient's other names of settings that have a variable of their own.
const OTHER_NAMES: [(&str, &str); 7] = [
    ("XDS_ROOT_CA", "xds-root-cert"),
    ("CA_ROOT_CA", "ca-root-cert"),
    ("ALT_XDS_HOSTNAME", "xds-server-name"),
    ("ALT_CA_HOSTNAME", "ca-server-name"),
    ("INPOD_UDS", "zds-socket"),
    ("CLUSTER_DOMAIN", "cluster-domain"),
    ("RUST_LOG", "log-level"),
];
/// A variable for each header: the rest of its name is the header's.
const HEADERS: [(&str, &str); 2] = [("XDS_HEADER_", "xds-header"), ("CA_HEADER_", "ca-header")];

/// Keys of the mesh's `ProxyConfig` that say something to a node tunnel.
const MEANT: [&str; 6] = [
    "discoveryAddress",
    "concurrency",
    "terminationDrainDuration",
    "proxyAdminPort",
    "statusPort",
    "proxyMetadata",
];
/// Those that are for other proxies. One text serves all proxies of a mesh, so these are passed over.
const NOT_MEANT: [&str; 28] = [
    "availabilityZone",
    "binaryPath",
    "caCertificatesPem",
    "configPath",
    "controlPlaneAuthPolicy",
    "customConfigFile",
    "drainDuration",
    "envoyAccessLogService",
    "envoyMetricsService",
    "extraStatTags",
    "fileFlushInterval",
    "fileFlushMinSizeKb",
    "gatewayTopology",
    "holdApplicationUntilProxyStarts",
    "image",
    "interceptionMode",
    "meshId",
    "privateKeyProvider",
    "proxyBootstrapTemplatePath",
    "proxyHeaders",
    "proxyStatsMatcher",
    "readinessProbe",
    "runtimeValues",
    "serviceCluster",
    "statNameLength",
    "statsCompression",
    "statsdUdpAddress",
    "tracing",
];

/// The layers, the higher first.
///
/// # Errors
/// `PROXY_CONFIG` or a variable of JSON that is not what it should be.
pub fn layers(environment: &Environment) -> Result<Vec<Layer>, ConfigErrors> {
    let read = || -> Result<_, ConfigError> {
        let proxy_config = match environment.get(PROXY_CONFIG) {
            Some(text) => parse_yaml(text, &origin(PROXY_CONFIG))?,
            None => Map::new(),
        };
        let mut layers: Vec<Layer> = OTHER_NAMES
            .iter()
            .filter_map(|(name, flag)| Some((name, flag, environment.get(*name).filter(|v| !v.is_empty())?)))
            .map(|(name, flag, value)| one(&origin(name), flag, value.clone()))
            .collect();
        layers.extend(HEADERS.iter().filter_map(|(prefix, flag)| headers(environment, prefix, flag)));
        layers.extend(metadata(environment, &proxy_config)?);
        layers.push(from_proxy_config(&proxy_config)?);
        Ok(layers)
    };
    read().map_err(|error| ConfigErrors(vec![error]))
}

fn origin(variable: &str) -> String {
    format!("variable {variable}")
}

fn one(origin: &str, flag: &str, value: String) -> Layer {
    Layer { origin: origin.to_owned(), entries: vec![(flag.to_owned(), vec![value])] }
}

fn headers(environment: &Environment, prefix: &str, flag: &str) -> Option<Layer> {
    let named = |(name, value): (&String, &String)| Some(format!("{}={value}", name.strip_prefix(prefix)?));
    let values: Vec<String> = environment.iter().filter_map(named).collect();
    let entries = vec![(flag.to_owned(), values)];
    (!entries[0].1.is_empty()).then(|| Layer { origin: format!("variables {prefix}*"), entries })
}

/// One list of all that say something of the node: what is later here wins.
fn metadata(
    environment: &Environment,
    proxy_config: &Map<String, Value>,
) -> Result<Option<Layer>, ConfigError> {
    let mut all = BTreeMap::new();
    let mut origins = Vec::new();
    if let Some(value) = proxy_config.get("proxyMetadata") {
        let map =
            value.as_object().ok_or_else(|| wrong(PROXY_CONFIG, "proxyMetadata", value, "want a map"))?;
        all.extend(
            map.iter().map(|(key, value)| (key.strip_prefix(META).unwrap_or(key).to_owned(), text(value))),
        );
        origins.push(PROXY_CONFIG.to_owned());
    }
    for (name, value) in environment.iter().filter(|(name, _)| name.starts_with(META_JSON)) {
        let want = "want a JSON object";
        let parsed = serde_json::from_str::<Map<String, Value>>(value)
            .map_err(|_| wrong(name, name, &value.as_str().into(), want))?;
        all.extend(parsed.into_iter().map(|(key, value)| (key, text(&value))));
        origins.push(name.clone());
    }
    let named =
        |(name, value): (&String, &String)| Some((name.strip_prefix(META)?.to_owned(), value.clone()));
    let named: Vec<_> = environment.iter().filter_map(named).collect();
    if !named.is_empty() {
        origins.push(format!("{META}*"));
    }
    all.extend(named);
    let values = all.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
    let layer = Layer {
        origin: format!("variables {}", origins.join(", ")),
        entries: vec![("node-metadata".to_owned(), values)],
    };
    Ok((!origins.is_empty()).then_some(layer))
}

fn from_proxy_config(settings: &Map<String, Value>) -> Result<Layer, ConfigError> {
    let mut entries = Vec::new();
    for (key, value) in settings {
        if NOT_MEANT.contains(&key.as_str()) {
            continue;
        }
        let port = || {
            value
                .as_u64()
                .and_then(|port| u16::try_from(port).ok())
                .ok_or_else(|| wrong(PROXY_CONFIG, key, value, "want a port, 0 to 65535"))
        };
        let (flag, text) = match key.as_str() {
            "proxyMetadata" => continue,
            "discoveryAddress" => ("xds-address", text(value)),
            // Zero means every core there and here.
            "concurrency" => ("workers", text(value)),
            "terminationDrainDuration" => ("drain-deadline", text(value)),
            "proxyAdminPort" => ("admin-listen", format!("127.0.0.1:{}", port()?)),
            "statusPort" => ("metrics-listen", format!("[::]:{}", port()?)),
            _ => {
                return Err(ConfigError::UnknownKey {
                    origin: origin(PROXY_CONFIG),
                    key: key.clone(),
                    nearest: nearest(key, MEANT.into_iter().chain(NOT_MEANT)),
                });
            }
        };
        entries.push((flag.to_owned(), vec![text]));
    }
    Ok(Layer { origin: origin(PROXY_CONFIG), entries })
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn wrong(variable: &str, key: &str, value: &Value, want: &str) -> ConfigError {
    ConfigError::Value {
        origin: origin(variable),
        key: key.to_owned(),
        value: text(value),
        reason: want.to_owned(),
    }
}
