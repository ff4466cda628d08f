//! Outbound: what a captured connection's original destination means.
