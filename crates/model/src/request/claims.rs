//! What a verified token claims.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The claims of a token whose signature, issuer and times were verified, read from its JSON payload.
///
/// Texts, numbers and booleans are compared by their text, and a list holds any of its values; so a DENY for `admin: "true"`
/// is not evaded by a token in which it is the boolean. A name that is given twice in one object is an error: two
/// readers might each believe another of the two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Claims(BTreeMap<Box<str>, Claim>);

#[derive(Clone, Debug, PartialEq)]
enum Claim {
    /// `null`, or a list inside a list: it is there and has no value to compare.
    Other,
    Text(Box<str>),
    List(Vec<Claim>),
    Object(Claims),
}

impl Claims {
    /// Calls `found` with each value of the claim at `path`, one name for each level; with none where there is no such
    /// claim or it is an object.
    pub(super) fn each(&self, path: &[crate::Str], found: &mut dyn FnMut(&str)) {
        match self.at(path) {
            Some(Claim::Text(text)) => found(text),
            Some(Claim::List(items)) => {
                for item in items {
                    if let Claim::Text(text) = item {
                        found(text);
                    }
                }
            }
            Some(Claim::Other | Claim::Object(_)) | None => {}
        }
    }

    /// A claim that is one text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name) {
            Some(Claim::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Makes a list of a claim that is one text with spaces between its values, as `scope` is (W61).
    pub fn split_at_spaces(&mut self, name: &str) {
        if let Some(claim) = self.0.get_mut(name)
            && let Claim::Text(text) = claim
        {
            *claim = Claim::List(text.split_whitespace().map(|one| Claim::Text(one.into())).collect());
        }
    }

    fn at(&self, path: &[crate::Str]) -> Option<&Claim> {
        let (last, objects) = path.split_last()?;
        let mut claims = self;
        for name in objects {
            match claims.0.get(&**name)? {
                Claim::Object(inner) => claims = inner,
                _ => return None,
            }
        }
        claims.0.get(&**last)
    }
}

impl<'de> Deserialize<'de> for Claims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ClaimsVisitor)
    }
}

struct ClaimsVisitor;

impl<'de> Visitor<'de> for ClaimsVisitor {
    type Value = Claims;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of claims")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claims, A::Error> {
        let mut claims = BTreeMap::new();
        while let Some((name, claim)) = map.next_entry::<Box<str>, Claim>()? {
            match claims.entry(name) {
                Entry::Vacant(place) => place.insert(claim),
                Entry::Occupied(place) => {
                    return Err(A::Error::custom(format_args!("claim {:?} is given twice", place.key())));
                }
            };
        }
        Ok(Claims(claims))
    }
}

impl<'de> Deserialize<'de> for Claim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ClaimVisitor)
    }
}

struct ClaimVisitor;

impl<'de> Visitor<'de> for ClaimVisitor {
    type Value = Claim;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a claim")
    }

    fn visit_unit<E: Error>(self) -> Result<Claim, E> {
        Ok(Claim::Other)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Claim, E> {
        Ok(Claim::Text(value.to_string().into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Claim, E> {
        Ok(Claim::Text(value.to_string().into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Claim, E> {
        Ok(Claim::Text(value.to_string().into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Claim, E> {
        Ok(Claim::Text(value.to_string().into()))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Claim, E> {
        Ok(Claim::Text(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Claim, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Claim::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Claim, A::Error> {
        ClaimsVisitor.visit_map(map).map(Claim::Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Str;

    fn values(claims: &Claims, path: &[&str]) -> Vec<String> {
        let path: Vec<Str> = path.iter().map(|name| Str::from(*name)).collect();
        let mut all = Vec::new();
        claims.each(&path, &mut |value| all.push(value.to_owned()));
        all
    }

    #[test]
    fn a_claim_is_a_text_a_list_or_deeper() {
        let text = r#"{"iss":"i","n":7,"x":-7,"f":0.5,"yes":true,"none":null,
            "groups":["a",1,false,null,["deep"],{"k":"v"}],"realm":{"roles":["r","s"],"b":{"c":"d"}}}"#;
        let claims: Claims = serde_json::from_str(text).unwrap();
        for (path, wanted) in [
            (&["iss"][..], &["i"][..]),
            (&["n"], &["7"]),
            (&["x"], &["-7"]),
            (&["f"], &["0.5"]),
            (&["yes"], &["true"]),
            (&["none"], &[]),
            (&["missing"], &[]),
            (&["groups"], &["a", "1", "false"]),
            (&["groups", "k"], &[]),
            (&["realm"], &[]),
            (&["realm", "roles"], &["r", "s"]),
            (&["realm", "b", "c"], &["d"]),
            (&["realm", "b", "c", "d"], &[]),
            (&["iss", "b"], &[]),
            (&[], &[]),
        ] {
            assert_eq!(values(&claims, path), wanted, "{path:?}");
        }
        assert_eq!((claims.text("iss"), claims.text("groups"), claims.text("none")), (Some("i"), None, None));
    }

    #[test]
    fn a_claim_given_twice_is_refused_at_any_depth() {
        for text in [r#"{"a":1,"a":2}"#, r#"{"b":{"a":1,"a":1}}"#, r#"{"b":[{"a":1,"a":1}]}"#] {
            let error = serde_json::from_str::<Claims>(text).unwrap_err().to_string();
            assert!(error.contains(r#"claim "a" is given twice"#), "{error}");
        }
        assert!(serde_json::from_str::<Claims>("[]").is_err());
    }

    #[test]
    fn a_text_with_spaces_becomes_a_list_where_asked() {
        let mut claims: Claims = serde_json::from_str(r#"{"scope":"read  write ","n":["a b"]}"#).unwrap();
        claims.split_at_spaces("scope");
        claims.split_at_spaces("n");
        claims.split_at_spaces("missing");
        assert_eq!(values(&claims, &["scope"]), ["read", "write"]);
        assert_eq!(values(&claims, &["n"]), ["a b"]);
    }
}
