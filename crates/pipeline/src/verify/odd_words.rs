//! Words of qweight that stand out among the others of their linear.
//!
//! Limits were set on the embedded model and on SmolLM2, where sound linears stay below half of them
//! or so, however short the calibration.

use gptq_checkpoint::Bits;

/// Deviations under a word, over what is usual, below which no word is odd.
const MIN_ODD: f64 = 80.0;
/// And over those of the oddest but a few of the same linear. Without act-order, AutoGPTQ's numerics
/// leave words 4.4 times as odd in sound files (SmolLM2).
const ODD_FACTOR: f64 = 6.0;
/// Words that may be odd in a sound linear: one in so many.
const ODD_RANK: usize = 10_000;

/// A word of qweight, with the sum of its codes' squared deviations over the usual ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Word {
    score: f64,
    /// Row of qweight.
    pub(super) row: u32,
    /// Column of qweight: the output.
    pub(super) output: u32,
}

impl Word {
    /// Its deviations over the usual ones, a code in the mean.
    pub(super) fn times(&self, bits: Bits) -> f64 {
        self.score / codes_of_word(bits, self.row as usize).len() as f64
    }
}

/// Looks for the words of qweight whose deviations stand out from those of the linear's other words,
/// output by output. Of all words only those are kept that may be among the oddest.
pub(super) struct OddWords<'a> {
    bits: Bits,
    /// Of what is usual in every column.
    reciprocals: &'a [f64],
    /// Words that may be odd.
    rank: usize,
    words: Vec<Word>,
    /// Words of at most this score cannot be odd, nor say which are.
    floor: f64,
    squares: Vec<f64>,
    own: Vec<f64>,
}

impl<'a> OddWords<'a> {
    /// One over the mean squared deviation of each column, to weigh deviations with. No column is
    /// expected to be better than rounding makes it: 1/12.
    pub(super) fn reciprocals(usual: &[f64]) -> Vec<f64> {
        usual.iter().map(|usual| usual.max(1.0 / 12.0).recip()).collect()
    }

    /// For a linear of so many outputs.
    pub(super) fn new(bits: Bits, reciprocals: &'a [f64], outputs: usize) -> Self {
        let words = bits.words(reciprocals.len()) * outputs;
        let rank = (words / ODD_RANK).max(8).min(words.saturating_sub(1));
        // Where the word of that rank has less, the limit is the least one.
        let floor = MIN_ODD / ODD_FACTOR;
        let (words, squares, own) = (Vec::new(), Vec::new(), Vec::new());
        Self { bits, reciprocals, rank, words, floor, squares, own }
    }

    /// Looks at an output's words.
    pub(super) fn add(&mut self, output: usize, deviations: &[f32]) {
        let columns = deviations.len();
        self.squares.resize(columns, 0.0);
        let (squares, reciprocals) = (&mut self.squares[..columns], &self.reciprocals[..columns]);
        for i in 0..columns {
            let deviation = f64::from(deviations[i]);
            squares[i] = deviation * deviation * reciprocals[i];
        }
        self.own.clear();
        let whole = match self.bits {
            Bits::Two => sums_of::<16>(&self.squares, &mut self.own),
            Bits::Four => sums_of::<8>(&self.squares, &mut self.own),
            Bits::Eight => sums_of::<4>(&self.squares, &mut self.own),
            Bits::Three => {
                let rows = 0..self.bits.words(self.squares.len());
                let codes = |row| codes_of_word(Bits::Three, row);
                self.own.extend(rows.map(|row| self.squares[codes(row)].iter().sum::<f64>()));
                self.squares.iter().sum()
            }
        };
        for (row, &own) in self.own.iter().enumerate() {
            // The score is at most this.
            if own <= self.floor {
                continue;
            }
            let others = self.squares.len() - codes_of_word(self.bits, row).len();
            // A row may as a whole be off, as where its weights are small beside its scales.
            let score = own / ((whole - own) / others.max(1) as f64).max(1.0);
            if score > self.floor {
                self.words.push(Word { score, row: row as u32, output: output as u32 });
            }
        }
        if self.words.len() > 2 * self.rank + 4096 {
            self.shed();
        }
    }

    /// Adds what was found among other outputs.
    pub(super) fn merge(&mut self, other: Self) {
        self.words.extend(other.words);
        if self.words.len() > 2 * self.rank + 4096 {
            self.shed();
        }
    }

    /// Keeps those of the largest scores, down to that of the rank.
    fn shed(&mut self) {
        if self.words.len() <= self.rank + 1 {
            return;
        }
        self.words.select_nth_unstable_by(self.rank, |a, b| b.score.total_cmp(&a.score));
        self.words.truncate(self.rank + 1);
        self.floor = self.words[self.rank].score;
    }

    /// The odd words, the oddest first.
    pub(super) fn finish(mut self) -> Vec<Word> {
        self.shed();
        let mut words = self.words;
        words.sort_by(|a, b| {
            b.score.total_cmp(&a.score).then((a.output, a.row).cmp(&(b.output, b.row)))
        });
        let of_rank = words.get(self.rank).map_or(0.0, |word| word.score);
        let limit = (ODD_FACTOR * of_rank).max(MIN_ODD);
        words.truncate(self.rank);
        words.retain(|word| word.score > limit);
        // A code that lies in two words is seen under both: the odder one has the blame.
        let mut odd: Vec<Word> = Vec::with_capacity(words.len());
        for word in words {
            let beside = |of: &Word| of.output == word.output && of.row.abs_diff(word.row) == 1;
            if self.bits != Bits::Three || !odd.iter().any(beside) {
                odd.push(word);
            }
        }
        odd
    }
}

/// Sums of `N` values each, and of all.
fn sums_of<const N: usize>(values: &[f64], sums: &mut Vec<f64>) -> f64 {
    let words = values.as_chunks::<N>().0;
    sums.resize(words.len(), 0.0);
    let mut all = 0.0;
    for (sum, word) in sums.iter_mut().zip(words) {
        // In two lanes.
        let mut own = [0.0; 2];
        for pair in word.as_chunks::<2>().0 {
            own[0] += pair[0];
            own[1] += pair[1];
        }
        *sum = own[0] + own[1];
        all += *sum;
    }
    all
}

/// The columns that have bits in a row of qweight.
fn codes_of_word(bits: Bits, row: usize) -> std::ops::Range<usize> {
    let width = usize::from(bits.get());
    32 * row / width..(32 * (row + 1)).div_ceil(width)
}
