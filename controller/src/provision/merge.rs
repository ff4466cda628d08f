//! Strategic merge: a part of an object laid over the whole, as `kubectl patch` does it (D60).
//!
//! Maps are merged key by key, `null` removes a key, and lists of things with a name of their own are merged by that name; all
//! other lists are replaced. `$patch: delete` removes an entry, `$patch: replace` takes the overlay as it is. The order that
//! `$setElementOrder` asks for means nothing here.

use serde_json::{Map, Value};

/// How deep an overlay may be.
const MAX_DEPTH: usize = 64;

/// By what the entries of a list are told apart, as the API's own types say it.
fn key_of(list: &str, entry: &Value) -> Option<&'static str> {
    Some(match list {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "env"
        | "imagePullSecrets"
        | "secrets"
        | "resourceClaims"
        | "schedulingGates" => "name",
        "volumeMounts" => "mountPath",
        "volumeDevices" => "devicePath",
        "hostAliases" => "ip",
        "topologySpreadConstraints" => "topologyKey",
        "ownerReferences" => "uid",
        // Of a container, or of a Service.
        "ports" if entry.get("containerPort").is_some() => "containerPort",
        "ports" => "port",
        _ => return None,
    })
}

/// Lays `overlay` over `base`. `path` is what the overlay is called in errors.
///
/// # Errors
/// In words, with the place of what cannot be merged.
pub fn merge(base: &mut Map<String, Value>, overlay: &Map<String, Value>, path: &str) -> Result<(), String> {
    maps(base, overlay, path, 0)
}

fn maps(
    base: &mut Map<String, Value>,
    overlay: &Map<String, Value>,
    path: &str,
    depth: usize,
) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("{path}: is deeper than {MAX_DEPTH}"));
    }
    match overlay.get("$patch").map(|it| it.as_str()) {
        None | Some(Some("merge")) => {}
        Some(Some("replace")) => {
            base.clear();
        }
        Some(_) => return Err(format!("{path}.$patch: is neither merge nor replace")),
    }
    for (name, value) in overlay {
        if name == "$patch" || name.starts_with("$setElementOrder/") {
            continue;
        }
        let at = format!("{path}.{name}");
        if name.starts_with('$') {
            return Err(format!("{at}: is a directive that is not known ($patch and $setElementOrder are)"));
        }
        match (base.get_mut(name), value) {
            (_, Value::Null) => drop(base.remove(name)),
            (Some(Value::Object(below)), Value::Object(over)) => maps(below, over, &at, depth + 1)?,
            (Some(Value::Array(below)), Value::Array(over)) => lists(name, below, over, &at, depth + 1)?,
            (_, Value::Object(over)) => {
                let mut fresh = Map::new();
                maps(&mut fresh, over, &at, depth + 1)?;
                base.insert(name.clone(), fresh.into());
            }
            (_, Value::Array(over)) => {
                let mut fresh = Vec::new();
                lists(name, &mut fresh, over, &at, depth + 1)?;
                base.insert(name.clone(), fresh.into());
            }
            (_, value) => drop(base.insert(name.clone(), value.clone())),
        }
    }
    Ok(())
}

fn lists(
    name: &str,
    base: &mut Vec<Value>,
    overlay: &[Value],
    path: &str,
    depth: usize,
) -> Result<(), String> {
    let directive = |entry: &Value| entry.get("$patch").and_then(Value::as_str).map(str::to_owned);
    if overlay.iter().any(|it| directive(it).as_deref() == Some("replace")) {
        base.clear();
    }
    for (index, entry) in overlay.iter().enumerate() {
        let at = format!("{path}[{index}]");
        let Some(key) = key_of(name, entry) else {
            // Without names there is nothing to merge by.
            if overlay.iter().any(|it| directive(it).is_some()) {
                return Err(format!("{at}: a list without names is replaced as a whole, without $patch"));
            }
            *base = overlay.to_vec();
            return Ok(());
        };
        let only_directive = entry.as_object().is_some_and(|it| it.len() == 1 && it.contains_key("$patch"));
        if only_directive && directive(entry).as_deref() == Some("replace") {
            continue;
        }
        let Some(over) = entry.as_object() else { return Err(format!("{at}: is no map")) };
        let Some(named) = over.get(key) else { return Err(format!("{at}.{key}: is required")) };
        let found = base.iter().position(|it| it.get(key) == Some(named));
        match (directive(entry).as_deref(), found) {
            (Some("delete"), Some(found)) => drop(base.remove(found)),
            (Some("delete"), None) => {}
            (None | Some("merge" | "replace"), found) => {
                let mut over = over.clone();
                let whole = over.remove("$patch").is_some_and(|it| it == "replace");
                match found.and_then(|found| base[found].as_object_mut()).filter(|_| !whole) {
                    Some(below) => maps(below, &over, &at, depth + 1)?,
                    None => {
                        let mut fresh = Map::new();
                        maps(&mut fresh, &over, &at, depth + 1)?;
                        match found {
                            Some(found) => base[found] = fresh.into(),
                            None => base.push(fresh.into()),
                        }
                    }
                }
            }
            (Some(other), _) => {
                return Err(format!("{at}.$patch: {other:?} is none of merge, replace, delete"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn merged(base: Value, overlay: Value) -> Result<Value, String> {
        let mut base = base.as_object().unwrap().clone();
        merge(&mut base, overlay.as_object().unwrap(), "o")?;
        Ok(base.into())
    }

    /// D60.
    #[test]
    fn what_has_a_name_is_merged_by_it_and_everything_else_replaced() {
        let base = json!({
            "replicas": 1,
            "containers": [{"name": "a", "args": ["x", "y"], "ports": [{"containerPort": 1, "name": "one"}]}],
            "tolerations": [{"key": "a"}],
            "nodeSelector": {"os": "linux", "zone": "a"},
            "ports": [{"port": 15008, "name": "mesh"}],
        });
        let overlay = json!({
            "replicas": 3,
            "containers": [
                {"name": "a", "args": ["z"], "ports": [{"containerPort": 1, "protocol": "TCP"}, {"containerPort": 2}]},
                {"name": "b"},
            ],
            "tolerations": [{"key": "b"}],
            "nodeSelector": {"zone": null, "arch": "arm64"},
            "ports": [{"port": 15008, "appProtocol": "x"}],
        });
        let wanted = json!({
            "replicas": 3,
            "containers": [
                {"name": "a", "args": ["z"], "ports": [{"containerPort": 1, "name": "one", "protocol": "TCP"}, {"containerPort": 2}]},
                {"name": "b"},
            ],
            "tolerations": [{"key": "b"}],
            "nodeSelector": {"os": "linux", "arch": "arm64"},
            "ports": [{"port": 15008, "name": "mesh", "appProtocol": "x"}],
        });
        assert_eq!(merged(base, overlay), Ok(wanted));
    }

    /// D60.
    #[test]
    fn directives_delete_and_replace() {
        let base = json!({"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "m": {"x": 1}});
        let delete = json!({"env": [{"name": "A", "$patch": "delete"}], "m": {"$patch": "replace", "y": 2}});
        assert_eq!(
            merged(base.clone(), delete),
            Ok(json!({"env": [{"name": "B", "value": "2"}], "m": {"y": 2}}))
        );
        let replace = json!({"env": [{"$patch": "replace"}, {"name": "C"}]});
        assert_eq!(merged(base.clone(), replace), Ok(json!({"env": [{"name": "C"}], "m": {"x": 1}})));
        for (wrong, place) in [
            (json!({"env": [{"value": "1"}]}), "o.env[0].name"),
            (json!({"env": ["A"]}), "o.env[0]"),
            (json!({"env": [{"name": "A", "$patch": "drop"}]}), "o.env[0].$patch"),
            (json!({"$retainKeys": ["a"]}), "o.$retainKeys"),
            (json!({"m": {"$patch": "delete"}}), "o.m.$patch"),
        ] {
            let found = merged(base.clone(), wrong.clone()).unwrap_err();
            assert!(found.starts_with(place), "{wrong}: {found}");
        }
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(json!(1)), Just(json!("x")), Just(json!(null))];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let key = prop::sample::select(vec!["containers", "ports", "spec", "x"]);
            let named = ("[ab]", prop::collection::btree_map(key.clone(), inner.clone(), 0..3)).prop_map(
                |(name, rest)| {
                    let mut it: Map<String, Value> =
                        rest.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
                    it.insert("name".to_owned(), name.clone().into());
                    it.insert("port".to_owned(), name.into());
                    Value::from(it)
                },
            );
            prop_oneof![
                prop::collection::vec(named, 0..3).prop_map(Value::from),
                prop::collection::btree_map(key, inner, 0..4).prop_map(|map| {
                    map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>().into()
                }),
            ]
        })
    }

    proptest! {
        /// Laid over twice, an overlay does no more than once; and what it has is then there.
        #[test]
        fn an_overlay_is_idempotent(base in tree(), overlay in tree()) {
            let (Some(base), Some(overlay)) = (base.as_object(), overlay.as_object()) else { return Ok(()) };
            let mut once = base.clone();
            if merge(&mut once, overlay, "o").is_ok() {
                let mut twice = once.clone();
                prop_assert_eq!(merge(&mut twice, overlay, "o"), Ok(()));
                prop_assert_eq!(&once, &twice);
                for (key, value) in overlay {
                    prop_assert_eq!(once.contains_key(key), !value.is_null());
                }
            }
        }
    }
}
