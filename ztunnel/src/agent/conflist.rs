//! A CNI configuration with the plugin appended, or taken out (C72). Pure.

use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::cni::PLUGIN;

/// The configuration with `plugin` as its last entry, in place of any former one. A single plugin's configuration becomes a list of it
/// and ours. The text is given back as it was if nothing changes.
///
/// # Errors
/// It is no CNI configuration.
pub fn append(text: &str, plugin: &Value) -> anyhow::Result<String> {
    let mut list = parse(text)?;
    let plugins = plugins(&mut list)?;
    let wanted: Vec<Value> =
        plugins.iter().filter(|it| !is_ours(it)).chain(std::iter::once(plugin)).cloned().collect();
    if *plugins == wanted {
        return Ok(text.to_owned());
    }
    *plugins = wanted;
    Ok(serde_json::to_string_pretty(&list)? + "\n")
}

/// The configuration without the plugin; `None` if it is not in it.
///
/// # Errors
/// It is no CNI configuration.
pub fn remove(text: &str) -> anyhow::Result<Option<String>> {
    let mut list = parse(text)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|it| !is_ours(it));
    if plugins.len() == before {
        return Ok(None);
    }
    Ok(Some(serde_json::to_string_pretty(&list)? + "\n"))
}

/// The configuration itself names at least one plugin that is not ours.
pub fn is_primary(text: &str) -> bool {
    parse(text).and_then(|mut list| Ok(plugins(&mut list)?.iter().any(|it| !is_ours(it)))).unwrap_or_default()
}

fn parse(text: &str) -> anyhow::Result<Map<String, Value>> {
    let Value::Object(mut conf) = serde_json::from_str(text).context("not JSON")? else {
        anyhow::bail!("not an object")
    };
    if conf.contains_key("plugins") {
        return Ok(conf);
    }
    anyhow::ensure!(conf.contains_key("type"), "neither `plugins` nor `type`");
    // A single plugin: name and version belong to the list.
    let name = conf.remove("name").unwrap_or_else(|| json!("k8s-pod-network"));
    let version = conf.remove("cniVersion").unwrap_or_else(|| json!("0.3.1"));
    let list = json!({"cniVersion": version, "name": name, "plugins": [conf]});
    match list {
        Value::Object(list) => Ok(list),
        _ => anyhow::bail!("not an object"),
    }
}

fn plugins(list: &mut Map<String, Value>) -> anyhow::Result<&mut Vec<Value>> {
    list.get_mut("plugins").and_then(Value::as_array_mut).context("`plugins` is not a list")
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        r#"{"cniVersion":"1.0.0","name":"k","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;

    fn types(text: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(text).unwrap();
        let name = |it: &Value| it["type"].as_str().unwrap().to_owned();
        list["plugins"].as_array().unwrap().iter().map(name).collect()
    }

    /// C72.
    #[test]
    fn the_plugin_is_last_and_once_and_goes_without_a_trace() {
        let with = append(LIST, &json!({"type": PLUGIN, "x": 1})).unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", PLUGIN]);
        assert_eq!(append(&with, &json!({"type": PLUGIN, "x": 1})).unwrap(), with);
        let other = append(&with, &json!({"type": PLUGIN, "x": 2})).unwrap();
        assert_eq!(types(&other), ["bridge", "portmap", PLUGIN]);
        assert!(other.contains("\"x\": 2"));
        let without = remove(&other).unwrap().unwrap();
        let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(value(&without), value(LIST));
        assert_eq!(remove(&without).unwrap(), None);
    }

    #[test]
    fn a_single_plugins_configuration_becomes_a_list() {
        let conf = r#"{"cniVersion":"0.4.0","name":"k","type":"bridge","ipam":{}}"#;
        let list: Value = serde_json::from_str(&append(conf, &json!({"type": PLUGIN})).unwrap()).unwrap();
        assert_eq!(list["cniVersion"], "0.4.0");
        assert_eq!(list["plugins"], json!([{"type": "bridge", "ipam": {}}, {"type": PLUGIN}]));
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        for text in ["", "[]", "{}", "null", r#"{"plugins":{}}"#] {
            assert!(append(text, &json!({"type": PLUGIN})).is_err(), "{text:?}");
            assert!(!is_primary(text), "{text:?}");
        }
        assert!(is_primary(LIST));
        assert!(!is_primary(&json!({"plugins": [{"type": PLUGIN}]}).to_string()));
    }
}
