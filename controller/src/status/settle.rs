//! What is wanted beside what is there, to what is to be written. Pure.

use serde_json::{Map, Value, json};

/// What else a status is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    /// Whose entries of shared lists are ours.
    pub controller: Option<&'a str>,
    /// The object's, if its kind has any.
    pub generation: Option<i64>,
    /// The time, as RFC 3339.
    pub now: &'a str,
}

/// What is there.
#[derive(Clone, Copy, Debug)]
pub(super) struct There<'a> {
    /// `status`; null if there is none.
    pub status: &'a Value,
    /// The fields of it that are ours, as managed fields have them; null if there are none.
    pub owned: &'a Value,
    /// The list of conditions has one owner, whoever wrote each.
    pub whole: bool,
}

/// What is to be applied.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Body {
    /// All fields of `status` that are ours from now on.
    pub status: Map<String, Value>,
    /// It holds what is another's, as of what is there now: it must be refused if that has changed.
    pub shares: bool,
}

/// Lists whose entries belong to several controllers while the API server knows one owner of all: whoever writes, writes them all.
const SHARED: [&str; 2] = ["parents", "ancestors"];

/// By what the entries of a list are told apart, if its schema says so.
fn key_of(list: &str) -> Option<&'static str> {
    match list {
        "conditions" => Some("type"),
        "listeners" | "supportedFeatures" => Some("name"),
        _ => None,
    }
}

/// What is to be applied so that the status says what is wanted, or `None` if it does already and holds nothing more of ours.
/// Without `wanted` nothing of ours is.
pub(super) fn settle(
    wanted: Option<&Map<String, Value>>,
    there: There<'_>,
    context: Context<'_>,
) -> Option<Body> {
    let nothing = Map::new();
    let wanted = wanted.unwrap_or(&nothing);
    let mut status = Map::new();
    let mut shares = false;
    for (name, value) in wanted {
        if !SHARED.contains(&name.as_str()) {
            let mut value = field(name, value, there.status.get(name), context);
            if there.whole && name == "conditions" {
                value = with_others(value, there.status.get(name));
                shares = true;
            }
            status.insert(name.clone(), value);
        }
    }
    for name in SHARED {
        // Once the list is ours, so is what others wrote into it: without us it would be gone.
        let ours = there.owned.get(format!("f:{name}")).is_some();
        let list = match wanted.get(name).and_then(Value::as_array) {
            None if !ours => continue,
            list => shared(list.map_or(&[], Vec::as_slice), there.status.get(name), context),
        };
        status.insert(name.to_owned(), list.into());
        shares = true;
    }
    let written = status.iter().all(|(name, value)| same(name, value, there.status.get(name)));
    let stale = stale(there.owned, &Value::Object(status.clone()));
    (!written || stale).then_some(Body { status, shares })
}

/// Fills in what the writer knows.
fn field(name: &str, wanted: &Value, there: Option<&Value>, context: Context<'_>) -> Value {
    match wanted {
        Value::Object(fields) => {
            let of = |(name, value): (&String, &Value)| {
                let there = there.and_then(|it| it.get(name));
                (name.clone(), field(name, value, there, context))
            };
            fields.iter().map(of).collect::<Map<_, _>>().into()
        }
        Value::Array(items) => {
            let Some(key) = key_of(name) else { return wanted.clone() };
            let entry = |item: &Value| {
                let there = find(there, |other| other.get(key) == item.get(key));
                if name == "conditions" {
                    condition(item, there, context)
                } else {
                    field("", item, there, context)
                }
            };
            items.iter().map(entry).collect()
        }
        scalar => scalar.clone(),
    }
}

fn condition(wanted: &Value, there: Option<&Value>, context: Context<'_>) -> Value {
    let mut condition = wanted.clone();
    let same = there.filter(|it| it["status"] == wanted["status"]);
    let since = same.and_then(|it| it["lastTransitionTime"].as_str()).unwrap_or(context.now);
    condition["lastTransitionTime"] = since.into();
    if let Some(generation) = context.generation {
        condition["observedGeneration"] = generation.into();
    }
    condition
}

/// Conditions of other types, then these.
fn with_others(conditions: Value, there: Option<&Value>) -> Value {
    let other = |it: &&Value| find(Some(&conditions), |ours| ours["type"] == it["type"]).is_none();
    let mut list: Vec<Value> =
        there.and_then(Value::as_array).into_iter().flatten().filter(other).cloned().collect();
    list.extend(conditions.as_array().into_iter().flatten().cloned());
    list.into()
}

/// The whole list: others' entries as they are, ours in the place where they were, new ones at the end.
fn shared(wanted: &[Value], there: Option<&Value>, context: Context<'_>) -> Vec<Value> {
    let ours =
        |entry: &Value| context.controller.is_some_and(|name| entry["controllerName"].as_str() == Some(name));
    let mut missing: Vec<&Value> = wanted.iter().collect();
    let mut list = Vec::new();
    for entry in there.and_then(Value::as_array).into_iter().flatten() {
        if !ours(entry) {
            list.push(entry.clone());
        } else if let Some(at) = missing.iter().position(|it| of_the_same(it, entry)) {
            list.push(field("", missing.remove(at), Some(entry), context));
        }
    }
    list.extend(missing.into_iter().map(|entry| field("", entry, None, context)));
    list
}

fn of_the_same(one: &Value, other: &Value) -> bool {
    ["parentRef", "ancestorRef"].iter().all(|reference| one.get(reference) == other.get(reference))
}

/// Everything of `body` is there. What is there besides is not looked at, but in a list without keys.
fn same(name: &str, body: &Value, there: Option<&Value>) -> bool {
    let Some(there) = there else { return false };
    match (body, key_of(name)) {
        (Value::Object(fields), _) => fields.iter().all(|(name, value)| same(name, value, there.get(name))),
        (Value::Array(items), Some(key)) => items.iter().all(|item| {
            let there = find(Some(there), |other| other.get(key) == item.get(key));
            same("", item, there)
        }),
        (body, _) => body == there,
    }
}

fn find(list: Option<&Value>, is: impl Fn(&Value) -> bool) -> Option<&Value> {
    list?.as_array()?.iter().find(|item| is(item))
}

/// Something is ours that `body` does not hold. `owned` is in the form of managed fields: `f:` a field, `k:` an entry of a list by
/// its keys, `v:` one by its value, `.` the thing itself.
fn stale(owned: &Value, body: &Value) -> bool {
    let Some(owned) = owned.as_object() else { return false };
    owned.iter().any(|(path, below)| {
        let held = match path.split_once(':') {
            Some(("f", name)) => body.get(name),
            Some(("k", keys)) => {
                let Ok(Value::Object(keys)) = serde_json::from_str(keys) else { return true };
                find(Some(body), |item| keys.iter().all(|(key, value)| item.get(key) == Some(value)))
            }
            Some(("v", value)) => {
                let Ok(value) = serde_json::from_str::<Value>(value) else { return true };
                find(Some(body), |item| *item == value)
            }
            _ => return false,
        };
        held.is_none_or(|held| stale(below, held))
    })
}

/// Without times: whether two bodies say the same.
pub(super) fn gist(status: &Map<String, Value>) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.remove("lastTransitionTime");
                fields.values_mut().for_each(strip);
            }
            Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut gist = json!(status);
    strip(&mut gist);
    gist
}
