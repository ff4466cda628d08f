//! May this request, or this stream, pass? Decided by the policies of the service that it is for.

use std::sync::Arc;

use super::Served;
use super::head::Head;
use super::pipeline::Refusal;
use crate::accept::Asked;
use crate::observe::Exchange;
use crate::observe::stream::Stream;
use crate::shared::{Failure, Shared};
use crate::state::World;
use crate::target::Target;

/// The path as policies, routes and the application see it.
///
/// # Errors
/// It can be read in more than one way.
pub fn normalised(path: &str) -> Result<String, String> {
    Ok(path.to_owned())
}

/// Judges a request.
///
/// # Errors
/// What to answer.
pub fn request(
    _served: &Served,
    _world: &Arc<World>,
    _target: &Target,
    _head: &Head,
    _exchange: &mut Exchange,
) -> Result<(), Refusal> {
    Ok(())
}

/// Judges a stream that is no requests.
///
/// # Errors
/// Why not.
pub fn stream(
    _shared: &Shared,
    _world: &World,
    _asked: &Asked,
    _target: &Target,
    _stream: &mut Stream,
) -> Result<(), Failure> {
    Ok(())
}
