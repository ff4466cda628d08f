//! ReferenceGrant: who may refer to what is in its namespace.

use serde::{Deserialize, Serialize};

use crate::meta::ObjectMeta;

/// Lets objects of other namespaces refer to some of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReferenceGrant {
    /// Its namespace is that of what may be referred to.
    pub metadata: ObjectMeta,
    /// Who, and to what.
    pub spec: ReferenceGrantSpec,
}

/// `spec` of a ReferenceGrant. Something that is not known in it could only restrict it, so it is refused and grants nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReferenceGrantSpec {
    /// Any of them may refer.
    #[serde(default)]
    pub from: Vec<GrantFrom>,
    /// To any of these.
    #[serde(default)]
    pub to: Vec<GrantTo>,
}

/// Who may refer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantFrom {
    /// API group, empty for the core.
    #[serde(default)]
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
}

/// To what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantTo {
    /// API group, empty for the core.
    #[serde(default)]
    pub group: String,
    /// Kind.
    pub kind: String,
    /// All of the kind if absent.
    #[serde(default)]
    pub name: Option<String>,
}

impl ReferenceGrant {
    /// Whether an object of kind `kind` (of the Gateway API) in `namespace` may refer to an object of this grant's namespace.
    pub fn permits(&self, kind: &str, namespace: &str, to: (&str, &str, &str)) -> bool {
        let (to_group, to_kind, to_name) = to;
        let from = |it: &GrantFrom| it.group == super::GROUP && it.kind == kind && it.namespace == namespace;
        let to = |it: &GrantTo| {
            it.group == to_group
                && it.kind == to_kind
                && it.name.as_deref().is_none_or(|name| name == to_name)
        };
        self.spec.from.iter().any(from) && self.spec.to.iter().any(to)
    }
}
