//! Steps of a decision, for those who explain it. One walk decides and explains, so that the two cannot differ.

/// Where steps go.
pub(crate) trait Trace<S> {
    fn record(&mut self, step: impl FnOnce() -> S);
}

/// Does not even make them.
pub(crate) struct Silent;

impl<S> Trace<S> for Silent {
    #[inline]
    fn record(&mut self, _step: impl FnOnce() -> S) {}
}

impl<S> Trace<S> for &mut Vec<S> {
    fn record(&mut self, step: impl FnOnce() -> S) {
        self.push(step());
    }
}
