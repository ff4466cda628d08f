//! SPIFFE identities as the mesh uses them: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` (Z85).

use std::fmt;
use std::str::FromStr;

use crate::Str;

const SCHEME: &str = "spiffe://";
/// SPIFFE ID section 2.1: a trust domain name is at most 255 bytes.
const MAX_TRUST_DOMAIN: usize = 255;
/// Kubernetes names are DNS-1123 labels or subdomains: 253 bytes at most.
const MAX_NAME: usize = 253;

/// Who a workload is: its trust domain, namespace and service account. Nothing else about a peer is believed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    trust_domain: Str,
    namespace: Str,
    service_account: Str,
}

/// Why a text is no identity of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdentityError {
    /// The URI has another scheme than `spiffe`.
    #[error("identity {0:?} does not begin with spiffe://")]
    Scheme(String),
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("identity {0:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape(String),
    /// One part is empty, too long or holds a character that neither DNS nor SPIFFE allows.
    #[error("{part} {value:?} of an identity must be 1 to {max} characters of a-z, 0-9, '-', '.' or '_'")]
    Part {
        /// Which part: `trust domain`, `namespace` or `service account`.
        part: &'static str,
        /// What it held.
        value: String,
        /// The longest that is allowed, bytes.
        max: usize,
    },
}

impl Identity {
    /// Joins the three parts after checking each.
    ///
    /// # Errors
    /// [`ParseIdentityError::Part`] names the first part that is empty, too long or has a character out of place.
    pub fn new(
        trust_domain: impl Into<Str>,
        namespace: impl Into<Str>,
        service_account: impl Into<Str>,
    ) -> Result<Self, ParseIdentityError> {
        Ok(Self {
            trust_domain: checked("trust domain", trust_domain.into(), MAX_TRUST_DOMAIN)?,
            namespace: checked("namespace", namespace.into(), MAX_NAME)?,
            service_account: checked("service account", service_account.into(), MAX_NAME)?,
        })
    }

    /// The trust domain: whose certificate authority vouches for it.
    pub fn trust_domain(&self) -> &Str {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &Str {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &Str {
        &self.service_account
    }

    /// The identity without its scheme, as AuthorizationPolicy writes principals: `cluster.local/ns/a/sa/b` (Z61).
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }

    /// Lets equal texts become one shared text; the texts themselves must stay what they are.
    pub(crate) fn for_each_part(&mut self, mut share: impl FnMut(&mut Str)) {
        [&mut self.trust_domain, &mut self.namespace, &mut self.service_account]
            .into_iter()
            .for_each(&mut share);
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix(SCHEME).ok_or_else(|| ParseIdentityError::Scheme(clip(text)))?;
        let mut parts = path.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(domain, namespace, account)
            }
            _ => Err(ParseIdentityError::Shape(clip(text))),
        }
    }
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Identity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn checked(part: &'static str, value: Str, max: usize) -> Result<Str, ParseIdentityError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_');
    if value.is_empty() || value.len() > max || !value.bytes().all(allowed) {
        return Err(ParseIdentityError::Part { part, value: clip(&value), max });
    }
    Ok(value)
}

/// What a peer sent may be long: an error quotes its beginning.
fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn other_uris_are_no_identities() {
        for text in [
            "",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?c",
            "SPIFFE://cluster.local/ns/a/sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_part_has_a_longest_length_and_an_error_quotes_its_beginning() {
        let parse = |domain: &str| format!("{SCHEME}{domain}/ns/a/sa/b").parse::<Identity>();
        assert!(parse(&"d".repeat(MAX_TRUST_DOMAIN)).is_ok());
        let long = "d".repeat(MAX_TRUST_DOMAIN + 1);
        let Err(ParseIdentityError::Part { part, value, max }) = parse(&long) else { panic!("{long}") };
        assert_eq!((part, value.as_str(), max), ("trust domain", &long[..128], MAX_TRUST_DOMAIN));
        let text = "x".repeat(300);
        assert_eq!(text.parse::<Identity>(), Err(ParseIdentityError::Scheme(text[..128].to_owned())));
    }

    #[test]
    fn every_part_can_be_shared() {
        let mut identity = Identity::new("domain", "namespace", "account").unwrap();
        let mut seen = Vec::new();
        identity.for_each_part(|part| seen.push(part.to_string()));
        assert_eq!(seen, ["domain", "namespace", "account"]);
    }

    proptest! {
        /// Z85.
        #[test]
        fn text_round_trips(domain in "[a-z0-9.-]{1,40}", ns in "[a-z0-9-]{1,40}", sa in "[a-z0-9.-]{1,40}") {
            let identity = Identity::new(domain, ns, sa).unwrap();
            prop_assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity.clone());
            prop_assert_eq!(format!("spiffe://{}", identity.principal()), identity.to_string());
        }

        #[test]
        fn any_text_parses_or_errs(text in ".{0,300}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
