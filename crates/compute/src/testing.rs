//! What unit tests share.

/// The largest absolute value; NaN where a value is, so that every bound on it fails. A fold with
/// `max` would drop that one.
pub(crate) fn largest<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    // Without its sign, NaN is above infinity in the total order.
    values.into_iter().map(|v| v.abs()).max_by(f64::total_cmp).unwrap_or(0.0)
}

#[test]
fn the_largest_of_nan_is_nan() {
    assert_eq!(largest(&[1.0, -3.0, 2.0]), 3.0);
    for nan in [f64::NAN, -f64::NAN] {
        assert!(largest(&[1.0, nan, f64::INFINITY]).is_nan());
    }
}
