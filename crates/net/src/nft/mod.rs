//! nf_tables over netlink: typed transactions, dumps for verification, change events. No library and no `nft` program.
//!
//! All tables are of family inet, so one table covers IPv4 and IPv6.

mod batch;
mod code;
mod dump;
mod expr;
mod monitor;
mod statement;
mod table;

pub use batch::{Batch, MAX_OPERATIONS, NftError};
pub use dump::{Installed, read_table};
pub use expr::{Cmp, Rule, Verdict};
pub use monitor::{Changes, Monitor};
pub use table::{Chain, Hook, HookPoint, HookType, Set, SetKey};
