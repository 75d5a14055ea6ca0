//! How a product is shared out over a card: which variant of its kernel takes it, and in how many slices.

use super::coded::{Coded, SUB, TILE_ROWS, subs};

/// Variants of the kernel, in the order of their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Pair,
    Single,
    Eight,
    Sixteen,
    /// Of `coded_stream.cuh`, for up to 8 tokens.
    StreamEight,
    /// For up to 16.
    StreamSixteen,
}

/// Rows of a unit of a stream, threads of its blocks, bytes of shared memory for its ring, and most stages of that; as
/// in `coded_stream.cuh`.
const STREAM_ROWS: usize = 256;
const STREAM_THREADS: usize = 544;
const STREAM_ROOM: usize = 230_144;
const MOST_STAGES: usize = 12;

/// What one takes; as in `coded_linear.cuh` and `coded_linear_16.cu`.
#[derive(Clone, Copy)]
struct Variant {
    tokens: usize,
    row_tiles: usize,
    warps: usize,
    /// Units whose sums have a place at a time; 0 where a warp takes whole units.
    turns: usize,
    /// Bytes of shared memory for rings and sums.
    room: usize,
}

/// What matters of a card: whether a block may have 227 KiB of shared memory, and multiprocessors.
#[derive(Clone, Copy)]
struct Card {
    large: bool,
    processors: usize,
}

/// What matters of a weight.
#[derive(Clone, Copy)]
struct Layout {
    bits: u8,
    /// Sub-blocks of a cell.
    every: usize,
    steps: usize,
}

/// A launch of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) kind: Kind,
    pub(super) slices: usize,
    /// Units of all weights, and rows of each.
    pub(super) units: usize,
    pub(super) unit_rows: usize,
    /// Blocks of threads, and threads of one.
    pub(super) blocks: usize,
    pub(super) threads: usize,
    /// Bytes of dynamic shared memory, and the most that any launch of the kernel takes.
    pub(super) shared: usize,
    pub(super) most_shared: usize,
    tokens: usize,
}

impl Card {
    /// A card by its architecture.
    fn new(arch: &str, processors: usize) -> Self {
        Self { large: matches!(arch.get(3..5), Some("90" | "10" | "11")), processors }
    }

    fn of(weight: &Coded) -> Self {
        let cuda = weight.cuda();
        Self::new(cuda.arch(), cuda.driver().multiprocessors())
    }

    fn most_shared(self) -> usize {
        if self.large { 226 << 10 } else { 99 << 10 }
    }

    fn variant(self, bits: u8, kind: Kind) -> Variant {
        let by_size = |large, small| if self.large { large } else { small };
        let wide = by_size(16, 8);
        if bits == 16 {
            let room = by_size(184_320, 101_376);
            return match kind {
                Kind::Pair => Variant { tokens: 2, row_tiles: 2, warps: wide, turns: 4, room },
                Kind::Single => Variant { tokens: 2, row_tiles: 1, warps: wide, turns: 4, room },
                Kind::Eight => {
                    Variant { tokens: 8, row_tiles: by_size(2, 1), warps: wide, turns: 2, room }
                }
                _ => {
                    let room = by_size(221_184, 101_376);
                    Variant { tokens: 16, row_tiles: by_size(4, 1), warps: 8, turns: 2, room }
                }
            };
        }
        let pair = by_size(2, 1);
        let few = by_size(163_840, 75_776);
        match kind {
            Kind::Pair => Variant { tokens: 4, row_tiles: pair, warps: wide, turns: 2, room: few },
            Kind::Single => Variant { tokens: 4, row_tiles: 1, warps: wide, turns: 2, room: few },
            Kind::Eight => Variant { tokens: 8, row_tiles: 1, warps: 8, turns: 0, room: 75_776 },
            _ => Variant { tokens: 16, row_tiles: 1, warps: 8, turns: 0, room: 75_776 },
        }
    }

    /// The variant for so many tokens and weights of so many rows. Two row tiles at a time are faster, unless
    /// the last of them keep too few multiprocessors busy.
    fn choose(self, bits: u8, tokens: usize, rows: &[usize]) -> Kind {
        if tokens <= self.variant(bits, Kind::Pair).tokens {
            let turns =
                |kind| units(rows, self.variant(bits, kind).row_tiles).div_ceil(self.processors);
            let shared_badly = 2 * turns(Kind::Pair) * 4 > turns(Kind::Single) * 5;
            return if shared_badly { Kind::Single } else { Kind::Pair };
        }
        if tokens <= 8 { Kind::Eight } else { Kind::Sixteen }
    }

    /// Slots of a stream that takes so many tokens, 0 where another kernel does: a stream takes more than four, and
    /// fewer if four have too much input for one slice and codes are not so small that slices are faster.
    fn slots(self, layout: Layout, tokens: usize) -> usize {
        let pair = self.variant(layout.bits, Kind::Pair);
        let fits = |tokens| {
            pair.fixed(layout) + tokens * layout.inputs(layout.steps) <= self.most_shared()
        };
        match tokens {
            _ if !self.large || layout.bits == 16 => 0,
            0..=1 => 0,
            2..=4 if layout.bits < 4 || fits(pair.tokens) => 0,
            2..=8 => 8,
            _ => 16,
        }
    }
}

/// Slots that the inputs of a weight's product with so many tokens have to have, 0 where they lie token by token.
pub(super) fn slots(weight: &Coded, tokens: usize) -> usize {
    Card::of(weight).slots(Layout::of(weight), tokens)
}

/// Units of weights of so many rows.
fn units(rows: &[usize], row_tiles: usize) -> usize {
    rows.iter().map(|rows| rows.div_ceil(row_tiles * TILE_ROWS)).sum()
}

impl Layout {
    fn of(weight: &Coded) -> Self {
        Self { bits: weight.bits(), every: weight.grid().every, steps: weight.steps() }
    }

    /// Cells of a step.
    fn cells(self) -> usize {
        if self.bits < 16 { subs(self.bits) / self.every } else { 0 }
    }

    /// Bytes of shared memory that a token's inputs of so many steps take.
    fn inputs(self, steps: usize) -> usize {
        steps * (subs(self.bits) * SUB * 2 + self.cells() * 16) + 16
    }
}

impl Variant {
    /// Bytes of shared memory for rings and sums.
    fn fixed(self, layout: Layout) -> usize {
        let codes = subs(layout.bits) * usize::from(layout.bits) / 8 * 512;
        let stage = self.warps * self.row_tiles * (codes + layout.cells() * 48);
        let sums = self.turns * self.warps * self.row_tiles * TILE_ROWS * self.tokens * 4;
        ((self.room - sums) / stage).min(8) * stage + sums
    }
}

impl Plan {
    /// For tokens and weights that go together with this one, of so many rows each.
    pub(super) fn new(weight: &Coded, rows: impl Iterator<Item = usize>, tokens: usize) -> Self {
        Self::of(Card::of(weight), Layout::of(weight), &rows.collect::<Vec<_>>(), tokens)
    }

    fn of(card: Card, layout: Layout, rows: &[usize], tokens: usize) -> Self {
        let slots = card.slots(layout, tokens);
        if slots > 0 {
            return Self::stream(card, layout, rows, slots);
        }
        let kind = card.choose(layout.bits, tokens, rows);
        let variant = card.variant(layout.bits, kind);
        let units = units(rows, variant.row_tiles);
        let fixed = variant.fixed(layout);
        // A token's sums are put together in the same way whoever comes with it.
        let together = if tokens == 1 { 1 } else { variant.tokens };
        // Of fp16 values they are read where they are.
        let (slices, inputs) = match layout.bits < 16 {
            true => {
                let room = card.most_shared() - fixed;
                let slices = slices(card, layout, variant, (units, together, room));
                (slices, tokens * layout.inputs(layout.steps.max(1).div_ceil(slices)))
            }
            false => (1, 0),
        };
        let workers = if variant.turns == 0 { variant.warps } else { 1 };
        let groups = (card.processors / slices).clamp(1, units.div_ceil(workers).max(1));
        Self {
            kind,
            slices,
            units,
            unit_rows: variant.row_tiles * TILE_ROWS,
            blocks: slices * groups,
            threads: 32 * variant.warps,
            shared: fixed + inputs,
            most_shared: card.most_shared(),
            tokens,
        }
    }

    /// By a stream: a block for every multiprocessor that there is a step for.
    fn stream(card: Card, layout: Layout, rows: &[usize], slots: usize) -> Self {
        let units = units(rows, STREAM_ROWS / TILE_ROWS);
        let codes = subs(layout.bits) * usize::from(layout.bits) / 8 * 512;
        let weights = STREAM_ROWS / TILE_ROWS * (codes + layout.cells() * 48);
        let inputs = subs(layout.bits) * SUB * slots * 2 + layout.cells() * slots * 4;
        let stage = (weights + inputs).next_multiple_of(128) + 16;
        Self {
            kind: if slots == 8 { Kind::StreamEight } else { Kind::StreamSixteen },
            slices: 1,
            units,
            unit_rows: STREAM_ROWS,
            blocks: card.processors.min(units * layout.steps).max(1),
            threads: STREAM_THREADS,
            shared: (STREAM_ROOM / stage).min(MOST_STAGES) * stage,
            most_shared: card.most_shared(),
            tokens: slots,
        }
    }

    /// Whether `coded_stream.cuh` has the kernel.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::StreamEight | Kind::StreamSixteen)
    }

    /// Values that slices leave, 0 where there is one.
    pub(super) fn share_values(&self) -> usize {
        match self.slices {
            1 => 0,
            slices => slices * self.units * self.unit_rows * self.tokens,
        }
    }

    /// Values that blocks of a stream leave for each other.
    pub(super) fn stream_values(&self) -> usize {
        match self.is_stream() {
            true => (self.units + self.blocks) * self.unit_rows * self.tokens,
            false => 0,
        }
    }
}

/// In how many slices the inputs of tokens fit: the fewest, or where warps take whole units, what shares them out
/// best.
fn slices(
    card: Card,
    layout: Layout,
    variant: Variant,
    (units, tokens, room): (usize, usize, usize),
) -> usize {
    const FURTHER: usize = 12;
    let steps = layout.steps.max(1);
    let fits = |&slices: &usize| tokens * layout.inputs(steps.div_ceil(slices)) <= room;
    // A step's inputs always fit.
    let fewest = (1..steps).find(fits).unwrap_or(steps);
    if variant.turns > 0 {
        return fewest;
    }
    let turns = |slices: usize| {
        let warps = (card.processors / slices).max(1) * variant.warps;
        units.div_ceil(warps) * steps.div_ceil(slices)
    };
    let mut best = fewest;
    for slices in fewest..=(fewest + FURTHER).min(steps) {
        // More of them leave more to add up.
        if turns(slices) * 100 < turns(best) * 97 {
            best = slices;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Card = Card { large: true, processors: 132 };
    const A10: Card = Card { large: false, processors: 72 };
    const KINDS: [Kind; 4] = [Kind::Pair, Kind::Single, Kind::Eight, Kind::Sixteen];

    #[test]
    fn every_variant_fits_a_multiprocessor() {
        for card in [H100, A10, Card { large: false, processors: 8 }] {
            for (bits, every) in
                [2, 3, 4, 8, 16].into_iter().flat_map(|bits| [1, 2, 4].map(|every| (bits, every)))
            {
                for kind in KINDS {
                    let layout = Layout { bits, every, steps: 1 };
                    let fixed = card.variant(bits, kind).fixed(layout);
                    assert!(fixed <= card.most_shared(), "{kind:?}, {bits} bits: {fixed}");
                }
                for (steps, tokens) in
                    [1, 64, 450].into_iter().flat_map(|s| [(s, 1), (s, 3), (s, 8), (s, 16)])
                {
                    let layout = Layout { bits, every, steps };
                    let plan = Plan::of(card, layout, &[8192, 40], tokens);
                    assert!(plan.shared <= plan.most_shared, "{plan:?}");
                    assert!(plan.slices <= steps && plan.blocks >= plan.slices, "{plan:?}");
                    assert_eq!(plan.blocks % plan.slices, 0, "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn one_row_tile_at_a_time_is_for_what_two_share_badly() {
        assert_eq!(H100.choose(4, 1, &[8192]), Kind::Pair);
        assert_eq!(H100.choose(16, 2, &[28_672, 28_672]), Kind::Pair);
        assert_eq!(H100.choose(3, 1, &[1024]), Kind::Single);
        assert_eq!(H100.choose(4, 3, &[1024]), Kind::Single);
        assert_eq!(H100.choose(4, 4, &[2560]), Kind::Pair);
        assert_eq!(H100.choose(16, 3, &[2560]), Kind::Eight);
        assert_eq!(A10.choose(4, 8, &[2560]), Kind::Eight);
        assert_eq!(A10.choose(8, 16, &[2560]), Kind::Sixteen);
    }

    /// As few slices as inputs fit in, unless warps that take whole units are shared out badly.
    #[test]
    fn slices_are_few_and_busy() {
        let slices = |steps, rows, tokens| {
            Plan::of(H100, Layout { bits: 4, every: 4, steps }, &[rows], tokens).slices
        };
        assert_eq!(slices(64, 8192, 1), 1);
        assert_eq!(slices(64, 8192, 4), 1);
        assert_eq!(slices(224, 8192, 1), 1);
        let of_small = |steps, tokens| {
            Plan::of(A10, Layout { bits: 4, every: 4, steps }, &[8192], tokens).slices
        };
        assert_eq!(of_small(64, 1), 1);
        assert!(of_small(64, 2) == of_small(64, 4) && of_small(64, 4) > 1);
        assert_eq!(slices(64, 8192, 16), 1);
    }

    #[test]
    fn streams_have_a_block_for_every_multiprocessor() {
        let plan = |rows: &[usize], steps, tokens| {
            Plan::of(H100, Layout { bits: 4, every: 4, steps }, rows, tokens)
        };
        let gate_up = plan(&[28_672, 28_672], 64, 16);
        assert_eq!((gate_up.kind, gate_up.blocks), (Kind::StreamSixteen, 132));
        assert_eq!(gate_up.stream_values(), (224 + 132) * 256 * 16);
        assert_eq!((plan(&[40], 3, 5).kind, plan(&[40], 3, 5).blocks), (Kind::StreamEight, 3));
        assert_eq!(plan(&[40], 3, 5).stream_values(), (1 + 3) * 256 * 8);
        assert_eq!(plan(&[8192], 64, 4).stream_values(), 0);
        // Four tokens of 28672 columns are more than fit; so two take the same way.
        let kind = |tokens| plan(&[8192], 224, tokens).kind;
        assert_eq!([1, 2, 4].map(kind), [Kind::Pair, Kind::StreamEight, Kind::StreamEight]);
        let at_3_bits = Plan::of(H100, Layout { bits: 3, every: 4, steps: 112 }, &[8192], 2);
        assert_eq!((at_3_bits.kind, at_3_bits.slices > 1), (Kind::Pair, true));
    }

    #[test]
    fn cards_with_much_shared_memory_are_known() {
        for (arch, large) in [
            ("sm_80", false),
            ("sm_89", false),
            ("sm_90a", true),
            ("sm_100a", true),
            ("sm_120a", false),
        ] {
            assert_eq!(Card::new(arch, 1).large, large, "{arch}");
        }
    }
}
