//! May this request, or this connection, pass a waypoint? One decision, from the policies of the service it is for and what
//! is known of it (W53-W58, W63, W64).
//!
//! [`judge()`] and [`explain`] are the same walk; the second writes down each step. What a policy asks may be *uncertain*: a
//! header that is repeated, a host with a port, a rule about HTTP on a connection that is none. Then an ALLOW policy does not
//! match and any other does ([`Truth`]), so that no policy is evaded by being ambiguous.

use serde::Serialize;

mod authority;
mod claims;
mod facts;
mod judge;
mod matching;
mod path;
mod pattern;
mod policy;
mod template;
mod verdict;

pub use authority::{Authority, BadAuthority};
pub use claims::Claims;
pub use facts::{Headers, HttpFacts, RequestFacts};
pub use judge::{explain, judge};
pub use path::{BadPath, MAX_PATH, Normalised, canonical, normalise};
pub use pattern::BadPattern;
pub(crate) use pattern::{PathPattern, TextPattern};
pub use policy::{Action, PolicySet, RequestPolicy, Targets};
pub(crate) use policy::{Condition, Rule, Test};
use template::Template;
pub use verdict::{Asked, Denial, Explanation, Findings, Permit, Question, Step, Verdict, Would};

/// How surely something holds. Ordered: of alternatives the highest counts, of what is all required the lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Truth {
    /// However it is read, it does not hold.
    No,
    /// It can be read either way.
    Maybe,
    /// However it is read, it holds.
    Yes,
}

impl Truth {
    /// Where its opposite is asked for. What is uncertain stays so.
    #[must_use]
    pub fn negated(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}
