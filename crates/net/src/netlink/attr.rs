//! Netlink attributes: 4 bytes of header (length, type), a value, padding to 4.

/// Set by us on every attribute that holds attributes; the kernel sets it on some.
pub(crate) const NESTED: u16 = 0x8000;
const KIND_MASK: u16 = 0x3fff;

/// Rounds up to the alignment of netlink.
pub(crate) const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// Attributes being written. The `_be` methods are for nf_tables, whose integers are in network order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attrs {
    buf: Vec<u8>,
}

impl Attrs {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.buf
    }

    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(4 + value.len()).expect("an attribute we write is below 64 KiB");
        self.buf.extend_from_slice(&len.to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(value);
        self.buf.resize(align(self.buf.len()), 0);
        self
    }

    /// A NUL-terminated string.
    pub(crate) fn put_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.put(kind, &bytes)
    }

    pub(crate) fn put_be(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    pub(crate) fn put_ne(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Attributes written elsewhere.
    pub(crate) fn append(&mut self, other: &Attrs) -> &mut Self {
        self.buf.extend_from_slice(&other.buf);
        self
    }

    /// An attribute that holds what `f` writes.
    pub(crate) fn nest(&mut self, kind: u16, f: impl FnOnce(&mut Attrs)) -> &mut Self {
        let mut inner = Attrs::default();
        f(&mut inner);
        self.put(kind | NESTED, &inner.buf)
    }
}

/// An attribute being read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attr<'a> {
    pub kind: u16,
    pub nested: bool,
    pub value: &'a [u8],
}

/// The attributes in `data`; stops at the first malformed one.
pub(crate) fn attrs(mut data: &[u8]) -> impl Iterator<Item = Attr<'_>> {
    std::iter::from_fn(move || {
        let header = data.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = data.get(4..len)?;
        data = data.get(align(len)..).unwrap_or_default();
        Some(Attr { kind: kind & KIND_MASK, nested: kind & NESTED != 0, value })
    })
}

/// The value of the first attribute of a type.
pub(crate) fn find(data: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(data).find(|a| a.kind == kind).map(|a| a.value)
}

/// A NUL-terminated string attribute.
pub(crate) fn find_str(data: &[u8], kind: u16) -> Option<&str> {
    let value = find(data, kind)?;
    std::str::from_utf8(value.strip_suffix(b"\0").unwrap_or(value)).ok()
}

/// A 32-bit attribute in network order.
pub(crate) fn find_be(data: &[u8], kind: u16) -> Option<u32> {
    find(data, kind)?.first_chunk::<4>().map(|b| u32::from_be_bytes(*b))
}

/// A 32-bit attribute in the machine's order.
pub(crate) fn find_ne(data: &[u8], kind: u16) -> Option<u32> {
    find(data, kind)?.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b))
}

/// Whether every attribute of `wanted` is in `have` with the same value. `have` may hold more (the kernel adds counters
/// and defaults). Nested attributes, which `wanted` marks, are compared the same way; a type may occur once a level.
pub(crate) fn includes(have: &[u8], wanted: &[u8]) -> bool {
    attrs(wanted).all(|want| {
        find(have, want.kind)
            .is_some_and(|value| if want.nested { includes(value, want.value) } else { value == want.value })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn written_attributes_read_back() {
        let mut a = Attrs::default();
        a.put_str(1, "abc").put_be(2, 7).nest(3, |n| {
            n.put(1, &[9]);
        });
        let bytes = a.as_bytes();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(find_str(bytes, 1), Some("abc"));
        assert_eq!(find_be(bytes, 2), Some(7));
        assert_eq!(find(find(bytes, 3).unwrap(), 1), Some(&[9_u8][..]));
    }

    #[test]
    fn inclusion_ignores_extras_but_not_differences() {
        let mut wanted = Attrs::default();
        wanted.put_be(1, 5).nest(2, |n| {
            n.put_be(1, 6);
        });
        let mut have = Attrs::default();
        have.put_be(9, 1).nest(2, |n| {
            n.put_be(3, 3).put_be(1, 6);
        });
        assert!(!includes(have.as_bytes(), wanted.as_bytes()));
        have.put_be(1, 5);
        assert!(includes(have.as_bytes(), wanted.as_bytes()));
        let mut other = Attrs::default();
        other.put_be(1, 5).nest(2, |n| {
            n.put_be(1, 7);
        });
        assert!(!includes(other.as_bytes(), wanted.as_bytes()));
    }

    proptest! {
        #[test]
        fn reading_never_panics(data: Vec<u8>) {
            for a in attrs(&data) {
                prop_assert!(a.value.len() <= data.len());
            }
            for m in crate::netlink::messages(&data) {
                let _ = m.outcome();
            }
        }
    }
}
