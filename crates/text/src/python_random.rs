//! Python's `random` module, as far as the published calibration windows depend on it.
//!
//! The windows of the published branches start at `random.randint(0, n)` after `random.seed(0)`.
//! To cut the same windows, this reproduces `CPython`'s generator bit for bit: MT19937 seeded by
//! `init_by_array` (Matsumoto and Nishimura, mt19937ar.c; `CPython` `Modules/_randommodule.c`) and
//! the rejection sampling of `Random._randbelow_with_getrandbits` (`CPython` `Lib/random.py`).

const STATE_WORDS: usize = 624;
const SHIFT_WORDS: usize = 397;
const UPPER_BIT: u32 = 0x8000_0000;
const LOWER_BITS: u32 = 0x7fff_ffff;
const TWIST: u32 = 0x9908_b0df;

/// The state of `random.Random(seed)` for a non-negative integer seed.
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; STATE_WORDS],
    next: usize,
}

impl PythonRandom {
    /// `random.seed(seed)`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        // CPython passes the seed's 32-bit digits without leading zeros, but at least one.
        let key = [low, high];
        let digits = if high == 0 { 1 } else { 2 };
        Self { state: init_by_array(&key[..digits]), next: STATE_WORDS }
    }

    /// `random.randint(0, last)`: uniform over 0..=last.
    pub fn up_to(&mut self, last: u64) -> u64 {
        // In u128, because `last + 1` and its draw need 65 bits when `last` is the largest u64.
        let count = u128::from(last) + 1;
        let bits = u128::BITS - count.leading_zeros();
        loop {
            // Rejection keeps the distribution uniform; a power of two has one bit to spare, so
            // half of its draws are rejected: this is what CPython does, and must be kept.
            let draw = self.bits(bits);
            if draw < count {
                return draw as u64;
            }
        }
    }

    /// `random.shuffle(list(range(count)))`.
    pub fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.up_to(last as u64) as usize);
        }
        order
    }

    /// `random.getrandbits(count)` for 1 to 128 bits: whole words first, from the lowest up.
    fn bits(&mut self, count: u32) -> u128 {
        let mut value = 0;
        for shift in (0..count).step_by(32) {
            let wanted = (count - shift).min(32);
            value |= u128::from(self.word() >> (32 - wanted)) << shift;
        }
        value
    }

    /// The next tempered 32-bit word of MT19937.
    fn word(&mut self) -> u32 {
        if self.next == STATE_WORDS {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Replaces all words of the state by the next 624.
    fn twist(&mut self) {
        for i in 0..STATE_WORDS {
            let joined =
                (self.state[i] & UPPER_BIT) | (self.state[(i + 1) % STATE_WORDS] & LOWER_BITS);
            let odd = if joined & 1 == 1 { TWIST } else { 0 };
            self.state[i] = self.state[(i + SHIFT_WORDS) % STATE_WORDS] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// `init_genrand` of mt19937ar.c.
fn init_by_word(seed: u32) -> [u32; STATE_WORDS] {
    let mut state = [seed; STATE_WORDS];
    for i in 1..STATE_WORDS {
        state[i] = scramble(state[i - 1], 1_812_433_253).wrapping_add(i as u32);
    }
    state
}

/// `init_by_array` of mt19937ar.c.
fn init_by_array(key: &[u32]) -> [u32; STATE_WORDS] {
    let mut state = init_by_word(19_650_218);
    let mut i = 1;
    for step in 0..STATE_WORDS.max(key.len()) {
        let j = step % key.len();
        state[i] = (state[i] ^ scramble(state[i - 1], 1_664_525))
            .wrapping_add(key[j])
            .wrapping_add(j as u32);
        i = advance(&mut state, i);
    }
    for _ in 1..STATE_WORDS {
        state[i] = (state[i] ^ scramble(state[i - 1], 1_566_083_941)).wrapping_sub(i as u32);
        i = advance(&mut state, i);
    }
    state[0] = UPPER_BIT;
    state
}

fn scramble(word: u32, factor: u32) -> u32 {
    (word ^ (word >> 30)).wrapping_mul(factor)
}

/// The index after `i`; past the end it wraps to 1, and word 0 takes the last word's value.
fn advance(state: &mut [u32; STATE_WORDS], i: usize) -> usize {
    if i + 1 < STATE_WORDS {
        return i + 1;
    }
    state[0] = state[STATE_WORDS - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::PythonRandom;

    fn draws(seed: u64, last: u64, count: usize) -> Vec<u64> {
        let mut random = PythonRandom::new(seed);
        (0..count).map(|_| random.up_to(last)).collect()
    }

    // Every literal: python3 -c "import random; random.seed(SEED);
    //   print([random.randint(0, LAST) for _ in range(COUNT)])"   (CPython 3.11.7)
    #[test]
    fn window_offsets_equal_cpython() {
        let last = 331_591;
        assert_eq!(draws(0, last, 6), [201979, 220500, 21225, 135746, 268055, 254766]);
        assert_eq!(draws(1, last, 6), [70445, 298426, 33086, 133729, 61823, 259750]);
        assert_eq!(draws(42, last, 6), [58369, 13112, 144194, 128393, 117026, 73158]);
        assert_eq!(
            draws(u64::from(u32::MAX), last, 6),
            [324832, 106535, 112901, 318435, 273886, 152743]
        );
    }

    #[test]
    fn seeds_above_32_bits_equal_cpython() {
        let last = 331_591;
        assert_eq!(draws(1 << 32, last, 6), [59241, 184188, 219062, 8743, 11965, 320718]);
        assert_eq!(
            draws(12_345_678_901_234_567_890, last, 6),
            [268444, 286679, 234642, 171261, 185613, 275672]
        );
        assert_eq!(draws(u64::MAX, last, 6), [11442, 130431, 177259, 324403, 111132, 239108]);
    }

    #[test]
    fn a_range_of_one_value_still_consumes_words() {
        // random.seed(1); [random.randint(0, 0) for _ in range(2)]
        //   + [random.randint(0, 1) for _ in range(8)]
        let mut random = PythonRandom::new(1);
        let mut got: Vec<u64> = (0..2).map(|_| random.up_to(0)).collect();
        got.extend((0..8).map(|_| random.up_to(1)));
        assert_eq!(got, [0, 0, 1, 0, 1, 1, 1, 1, 0, 0]);
        // random.seed(42); [random.randint(5, 7) for _ in range(10)]
        let three: Vec<u64> = draws(42, 2, 10).iter().map(|draw| 5 + draw).collect();
        assert_eq!(three, [7, 5, 5, 7, 6, 5, 5, 5, 7, 5]);
    }

    #[test]
    fn ranges_above_32_bits_equal_cpython() {
        assert_eq!(
            draws(0, u64::from(u32::MAX), 4),
            [3626764237, 1806341205, 2195908194, 2046968324]
        );
        assert_eq!(draws(42, 1 << 40, 4), [247559453085, 538052153943, 305901360862, 226501419177]);
        assert_eq!(
            draws(0, u64::MAX, 4),
            [7758176404715800194, 15308084094301570617, 8791662011684601223, 9309829342914403545]
        );
    }

    #[test]
    fn a_shuffle_equals_cpython() {
        // random.seed(0); r = list(range(10)); random.shuffle(r); print(r)
        assert_eq!(PythonRandom::new(0).shuffled(10), [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]);
        assert_eq!(PythonRandom::new(7).shuffled(5), [4, 0, 3, 1, 2]);
        assert!(PythonRandom::new(0).shuffled(0).is_empty());
    }

    #[test]
    fn the_state_is_renewed_after_624_words() {
        // random.seed(0); [random.getrandbits(32) for _ in range(2000)][-1]
        let mut random = PythonRandom::new(0);
        let last = (0..2000).map(|_| random.word()).last();
        assert_eq!(last, Some(3908016617));
    }
}
