//! Everything a proxy knows at one moment. Decisions read one snapshot; changes make the next.
