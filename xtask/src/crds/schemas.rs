//! What `spec` of each kind may hold. CEL rules say what a shape cannot; they look at whole objects, never through lists, so
//! that their cost stays far below the API server's budget.

use serde_json::{Value, json};

/// A TCP port as text.
const PORT: &str = "^([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$";

/// An object that keeps what is unknown, for the controller to refuse.
fn kept(properties: Value, more: Value) -> Value {
    let mut object = closed(properties, more);
    object["x-kubernetes-preserve-unknown-fields"] = json!(true);
    object
}

/// An object; `more` is what else its schema says.
fn closed(properties: Value, more: Value) -> Value {
    let mut object = json!({"type": "object", "properties": properties});
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// At least one: an empty list would be read as "any".
fn filled(items: Value) -> Value {
    json!({"type": "array", "minItems": 1, "items": items})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn port() -> Value {
    json!({"type": "integer", "minimum": 1, "maximum": 65535})
}

fn labels() -> Value {
    json!({"type": "object", "maxProperties": 4096, "additionalProperties": {"type": "string", "maxLength": 63}})
}

fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

fn selector() -> Value {
    kept(json!({"matchLabels": labels()}), json!({}))
}

fn target_ref() -> Value {
    let properties = json!({"group": text(), "kind": text(), "name": text(), "namespace": text()});
    kept(properties, json!({"required": ["kind", "name"]}))
}

fn one_target() -> [Value; 2] {
    [
        rule(
            "!(has(self.selector) && (has(self.targetRef) || has(self.targetRefs)))",
            "selector cannot stand beside targetRefs: give one of them",
        ),
        rule(
            "!(has(self.targetRef) && has(self.targetRefs))",
            "targetRef cannot stand beside targetRefs: give one of them",
        ),
    ]
}

/// Attributes, each a list and a `not` form, sharing one form of value.
fn attributes(names: &[&str], items: &Value) -> serde_json::Map<String, Value> {
    let negated = |name: &str| format!("not{}{}", name[..1].to_ascii_uppercase(), &name[1..]);
    let both = names.iter().flat_map(|name| [(*name).to_owned(), negated(name)]);
    both.map(|name| (name, filled(items.clone()))).collect()
}

/// Conditions are told apart by their type, so that several controllers may each own theirs.
pub(super) fn status() -> Value {
    let condition = json!({
        "type": text(),
        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
        "reason": text(),
        "message": text(),
        "lastTransitionTime": {"type": "string", "format": "date-time"},
        "lastProbeTime": {"type": "string", "format": "date-time"},
        "observedGeneration": {"type": "integer", "format": "int64"},
    });
    let conditions = json!({
        "type": "array",
        "items": kept(condition, json!({"required": ["type", "status"]})),
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    });
    kept(json!({"conditions": conditions}), json!({}))
}

pub(super) fn authorization_policy() -> Value {
    let sources =
        ["principals", "requestPrincipals", "namespaces", "serviceAccounts", "ipBlocks", "remoteIpBlocks"];
    let source = kept(Value::Object(attributes(&sources, &text())), json!({"minProperties": 1}));
    let mut operations = attributes(&["hosts", "methods", "paths"], &text());
    operations.extend(attributes(&["ports"], &json!({"type": "string", "pattern": PORT})));
    let operation = kept(Value::Object(operations), json!({"minProperties": 1}));
    let condition = kept(
        json!({"key": text(), "values": filled(text()), "notValues": filled(text())}),
        json!({"required": ["key"], "minProperties": 2}),
    );
    let rule_ = kept(
        json!({
            "from": filled(kept(json!({"source": source}), json!({"required": ["source"]}))),
            "to": filled(kept(json!({"operation": operation}), json!({"required": ["operation"]}))),
            "when": filled(condition),
        }),
        json!({}),
    );
    let [first, second] = one_target();
    let custom = rule(
        "(has(self.action) && self.action == 'CUSTOM') == has(self.provider)",
        "provider goes with action CUSTOM, and only with it",
    );
    kept(
        json!({
            "selector": selector(),
            "targetRef": target_ref(),
            "targetRefs": list(target_ref()),
            "action": {"type": "string", "enum": ["ALLOW", "DENY", "AUDIT", "CUSTOM"]},
            "provider": kept(json!({"name": text()}), json!({"required": ["name"]})),
            "rules": list(rule_),
        }),
        json!({"x-kubernetes-validations": [first, second, custom]}),
    )
}

pub(super) fn peer_authentication() -> Value {
    let mode = json!({"type": "string", "enum": ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]});
    let mtls = kept(json!({"mode": mode}), json!({}));
    let ports = json!({
        "type": "object",
        "maxProperties": 64,
        "additionalProperties": mtls,
        "x-kubernetes-validations": [rule(
            "self.all(key, 0 < int(key) && int(key) <= 65535)",
            "keys are ports from 1 to 65535",
        )],
    });
    let selected = rule(
        "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) \
         && self.selector.matchLabels.size() > 0)",
        "portLevelMtls needs a selector that names workloads",
    );
    kept(
        json!({"selector": selector(), "mtls": mtls, "portLevelMtls": ports}),
        json!({"x-kubernetes-validations": [selected]}),
    )
}

pub(super) fn request_authentication() -> Value {
    let rule_ = kept(
        json!({
            "issuer": {"type": "string", "minLength": 1},
            "audiences": list(text()),
            "jwksUri": text(),
            "jwks": text(),
        }),
        json!({"required": ["issuer"], "x-kubernetes-validations": [rule(
            "!(has(self.jwks) && has(self.jwksUri))",
            "jwks cannot stand beside jwksUri: give one of them",
        )]}),
    );
    let rules = json!({"type": "array", "maxItems": 4096, "items": rule_});
    let properties = json!({
        "selector": selector(),
        "targetRef": target_ref(),
        "targetRefs": list(target_ref()),
        "jwtRules": rules,
    });
    kept(properties, json!({"x-kubernetes-validations": one_target()}))
}

fn entry(more: Value) -> Value {
    let properties = json!({
        "address": {"type": "string", "maxLength": 253},
        "ports": {"type": "object", "maxProperties": 128, "additionalProperties": port()},
        "labels": labels(),
        "network": text(),
        "locality": text(),
        "weight": {"type": "integer", "minimum": 0, "maximum": 4_294_967_295_u32},
        "serviceAccount": text(),
    });
    closed(properties, more)
}

pub(super) fn workload_entry() -> Value {
    entry(json!({"x-kubernetes-validations": [rule(
        "has(self.address) || has(self.network)",
        "address is required, unless a network is named",
    )]}))
}

pub(super) fn service_entry() -> Value {
    let ports = closed(
        json!({"number": port(), "protocol": text(), "name": text(), "targetPort": port()}),
        json!({"required": ["number", "name"]}),
    );
    let apart = rule(
        "!(has(self.workloadSelector) && has(self.endpoints))",
        "workloadSelector cannot stand beside endpoints: give one of them",
    );
    let resolved = rule(
        "!has(self.endpoints) || (has(self.resolution) && self.resolution != 'NONE')",
        "endpoints need resolution STATIC or DNS",
    );
    closed(
        json!({
            "hosts": {"type": "array", "minItems": 1, "maxItems": 256, "items": {"type": "string", "maxLength": 255}},
            "addresses": {"type": "array", "maxItems": 256, "items": {"type": "string", "maxLength": 64}},
            "ports": {
                "type": "array", "maxItems": 256, "items": ports,
                "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
            },
            "location": {"type": "string", "enum": ["MESH_EXTERNAL", "MESH_INTERNAL"]},
            "resolution": {"type": "string", "enum": ["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN"]},
            "endpoints": {"type": "array", "maxItems": 4096, "items": entry(json!({}))},
            "workloadSelector": closed(json!({"labels": labels()}), json!({})),
            "exportTo": list(text()),
            "subjectAltNames": list(text()),
        }),
        json!({"required": ["hosts"], "x-kubernetes-validations": [apart, resolved]}),
    )
}

/// What its traffic policy may hold is the controller's to judge.
pub(super) fn destination_rule() -> Value {
    let policy = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let subset = closed(
        json!({"name": text(), "labels": labels(), "trafficPolicy": policy}),
        json!({"required": ["name"]}),
    );
    closed(
        json!({
            "host": {"type": "string", "minLength": 1},
            "trafficPolicy": policy,
            "subsets": list(subset),
            "exportTo": list(text()),
            "workloadSelector": closed(json!({"matchLabels": labels()}), json!({})),
        }),
        json!({"required": ["host"]}),
    )
}
