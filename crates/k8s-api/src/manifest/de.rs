//! From the tree to types, with the path, line and value of what did not fit.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, VariantAccess, Visitor,
};

use super::tree::{Node, Value, path_key};

/// What to do with a field that has no value (`principals:` and nothing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nulls {
    /// As if it were not there: what the API server does.
    Absent,
    /// Refuse: in a policy, a forgotten list would mean "any".
    Refused,
}

/// A field that did not fit.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldError {
    /// From the leaf to the root until [`FieldError::field`] turns it.
    path: Vec<String>,
    /// Of the deepest node seen; 0 until one was.
    pub line: u32,
    pub value: String,
    pub reason: String,
    pub expected: String,
}

/// Reads `T` from a tree.
pub(crate) fn from_node<'de, T: de::Deserialize<'de>>(
    node: &'de Node,
    nulls: Nulls,
) -> Result<T, FieldError> {
    T::deserialize(NodeDe { node, nulls }).map_err(|error| error.at(node))
}

impl FieldError {
    /// The path from the root.
    pub fn field(&self) -> String {
        let mut field = String::new();
        for segment in self.path.iter().rev() {
            if !field.is_empty() && !segment.starts_with('[') {
                field.push('.');
            }
            field.push_str(segment);
        }
        field
    }

    fn at(mut self, node: &Node) -> Self {
        if self.line == 0 {
            self.line = node.line;
        }
        self
    }

    fn under(mut self, segment: String) -> Self {
        self.path.push(segment);
        self
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field(), self.reason)
    }
}

impl std::error::Error for FieldError {}

impl de::Error for FieldError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { reason: message.to_string(), ..Self::default() }
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let kind = match unexpected {
            Unexpected::Str(_) => "a string",
            Unexpected::Bool(_) | Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => {
                "not a string; quote it if it is meant as one"
            }
            Unexpected::Seq => "a list",
            Unexpected::Map => "a map",
            Unexpected::Unit | Unexpected::Option => "empty",
            _ => "something else",
        };
        let reason = format!("wrong type: it is {kind}");
        Self { value: shown(&unexpected), reason, expected: expected.to_string(), ..Self::default() }
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self {
            value: shown(&unexpected),
            reason: "invalid value".into(),
            expected: expected.to_string(),
            ..Self::default()
        }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self {
            value: variant.into(),
            reason: "unknown value".into(),
            expected: format!("one of {}", expected.join(", ")),
            ..Self::default()
        }
    }

    fn unknown_field(_field: &str, expected: &'static [&'static str]) -> Self {
        Self {
            reason: "unknown field".into(),
            expected: format!("one of {}", expected.join(", ")),
            ..Self::default()
        }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { path: vec![field.into()], reason: "is required".into(), ..Self::default() }
    }
}

fn shown(unexpected: &Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Str(text) => (*text).to_owned(),
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Unsigned(value) => value.to_string(),
        Unexpected::Signed(value) => value.to_string(),
        Unexpected::Float(value) => value.to_string(),
        _ => String::new(),
    }
}

#[derive(Clone, Copy)]
struct NodeDe<'de> {
    node: &'de Node,
    nulls: Nulls,
}

impl<'de> Deserializer<'de> for NodeDe<'de> {
    type Error = FieldError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        let nulls = self.nulls;
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Word(_) => unreachable!("spelled out when the file was read"),
            Value::Str(value) => visitor.visit_borrowed_str(value),
            Value::Seq(items) => visitor.visit_seq(Items { items: items.iter().enumerate(), nulls }),
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter(), next: None, nulls }),
        }
        .map_err(|error| error.at(self.node))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FieldError> {
        match (&self.node.value, self.nulls) {
            (Value::Null, Nulls::Absent) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FieldError> {
        match &self.node.value {
            Value::Str(text) => visitor.visit_enum(UnitVariant(text)),
            _ => self.deserialize_any(visitor),
        }
        .map_err(|error| error.at(self.node))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Items<'de> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Node>>,
    nulls: Nulls,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = FieldError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, FieldError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        seed.deserialize(NodeDe { node, nulls: self.nulls })
            .map(Some)
            .map_err(|error| error.at(node).under(format!("[{index}]")))
    }
}

struct Entries<'de> {
    entries: std::slice::Iter<'de, (String, Node)>,
    next: Option<&'de (String, Node)>,
    nulls: Nulls,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = FieldError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, FieldError> {
        for entry in self.entries.by_ref() {
            if entry.1.value == Value::Null && self.nulls == Nulls::Absent {
                continue;
            }
            self.next = Some(entry);
            let key: StrDeserializer<'_, FieldError> = entry.0.as_str().into_deserializer();
            return seed
                .deserialize(key)
                .map(Some)
                .map_err(|error| error.at(&entry.1).under(path_key(&entry.0)));
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, FieldError> {
        let (key, node) = self.next.take().expect("serde asks for a value only after its key");
        if node.value == Value::Null {
            let reason = "has no value; remove it or fill it in".to_owned();
            return Err(FieldError { reason, ..FieldError::default() }.at(node).under(path_key(key)));
        }
        seed.deserialize(NodeDe { node, nulls: self.nulls })
            .map_err(|error| error.at(node).under(path_key(key)))
    }
}

struct UnitVariant<'de>(&'de str);

impl<'de> EnumAccess<'de> for UnitVariant<'de> {
    type Error = FieldError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), FieldError> {
        let name: StrDeserializer<'_, FieldError> = self.0.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for UnitVariant<'de> {
    type Error = FieldError;

    fn unit_variant(self) -> Result<(), FieldError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _seed: T) -> Result<T::Value, FieldError> {
        Err(de::Error::custom("a word alone is not enough here"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, FieldError> {
        Err(de::Error::custom("a word alone is not enough here"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, FieldError> {
        Err(de::Error::custom("a word alone is not enough here"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;
    use crate::manifest::tree::parse;

    #[derive(Debug, Deserialize, PartialEq)]
    enum Mode {
        Strict,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        name: String,
        #[serde(default)]
        list: Vec<u16>,
        #[serde(default)]
        map: BTreeMap<String, Option<u16>>,
        #[serde(default)]
        mode: Option<Mode>,
    }

    fn fail(text: &str, nulls: Nulls) -> (u32, String, String, String) {
        let node = parse(text).unwrap().remove(0);
        let error = from_node::<Outer>(&node, nulls).unwrap_err();
        (error.line, error.field(), error.value, error.reason)
    }

    #[test]
    fn places_of_errors() {
        let (line, field, value, _) = fail("name: a\nlist:\n- 1\n- x\n", Nulls::Absent);
        assert_eq!((line, field.as_str(), value.as_str()), (4, "list[1]", "x"));
        let (line, field, _, reason) = fail("name: a\nmap:\n  a.b: 1\nmore: 2\n", Nulls::Absent);
        assert_eq!((line, field.as_str(), reason.as_str()), (4, "more", "unknown field"));
        let (_, field, _, _) = fail("name: a\nmap:\n  a.b: x\n", Nulls::Absent);
        assert_eq!(field, "map[\"a.b\"]");
        let (line, field, value, _) = fail("name: a\nmode: STRICT\n", Nulls::Absent);
        assert_eq!((line, field.as_str(), value.as_str()), (2, "mode", "STRICT"));
        let (line, field, _, reason) = fail("list: []\n", Nulls::Absent);
        assert_eq!((line, field.as_str(), reason.as_str()), (1, "name", "is required"));
        let (_, field, value, _) = fail("name: 1.0\n", Nulls::Absent);
        assert_eq!((field.as_str(), value.as_str()), ("name", "1"));
    }

    #[test]
    fn an_empty_field_is_absent_or_refused() {
        let text = "name: a\nlist:\nmode:\n";
        let node = parse(text).unwrap().remove(0);
        assert_eq!(from_node::<Outer>(&node, Nulls::Absent).unwrap().list, Vec::<u16>::new());
        let (line, field, _, _) = fail(text, Nulls::Refused);
        assert_eq!((line, field.as_str()), (2, "list"));
    }
}
