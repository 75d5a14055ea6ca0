//! Frames: what travels between two ranks once they have met, and how much of it is believed.
//!
//! A frame is a kind and a number; data adds its parts, each a count and so many words, all
//! little-endian. What a frame says of its length is no reason to allocate: its buffer grows as its
//! bytes arrive, and no message is longer than the run's [`Limit`].

use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// What one rank sends to another: parts of 32-bit words.
pub type Message = Vec<Vec<u32>>;

const DATA: u8 = 0;
const ALIVE: u8 = 1;
const FAREWELL: u8 = 2;
const LOST: u8 = 3;

/// Words of a message before the ranks have agreed on their work.
const BEFORE_WORK: u64 = 1 << 16;
/// Parts of a message: one for each rank, or the few tensors of a linear.
const MOST_PARTS: u64 = 1 << 16;
/// Words that are read at first; after that, as many again as have arrived.
const STEP: usize = 1 << 16;

/// The most words that a message may have. It grows when the ranks know what they work on.
#[derive(Debug)]
pub struct Limit(AtomicU64);

impl Default for Limit {
    fn default() -> Self {
        Self(AtomicU64::new(BEFORE_WORK))
    }
}

impl Limit {
    /// Allows messages of so many words; never fewer than before.
    pub fn raise(&self, words: u64) {
        self.0.fetch_max(words, Ordering::Relaxed);
    }

    fn words(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a rank hears from another.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A message.
    Data(Message),
    /// A sign of life.
    Alive,
    /// The peer is through with its part; nothing follows.
    Farewell,
    /// A rank is lost, and with it the run.
    Lost(u64),
}

impl Frame {
    /// Reads the next frame.
    ///
    /// # Errors
    /// Those of the stream, and `InvalidData` for what is no frame or exceeds the limit.
    pub fn read(stream: &mut impl Read, limit: &Limit) -> io::Result<Self> {
        let mut kind = [0];
        stream.read_exact(&mut kind)?;
        let number = read_number(stream)?;
        match kind[0] {
            ALIVE => Ok(Self::Alive),
            FAREWELL => Ok(Self::Farewell),
            LOST => Ok(Self::Lost(number)),
            DATA => read_parts(stream, number, limit).map(Self::Data),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }

    /// Writes the frame.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        let (kind, number) = match self {
            Self::Data(message) => (DATA, message.len() as u64),
            Self::Alive => (ALIVE, 0),
            Self::Farewell => (FAREWELL, 0),
            Self::Lost(rank) => (LOST, *rank),
        };
        let mut head = [kind; 9];
        head[1..].copy_from_slice(&number.to_le_bytes());
        stream.write_all(&head)?;
        if let Self::Data(message) = self {
            for words in message {
                stream.write_all(&(words.len() as u64).to_le_bytes())?;
                stream.write_all(bytemuck::cast_slice(words))?;
            }
        }
        Ok(())
    }
}

fn read_parts(stream: &mut impl Read, parts: u64, limit: &Limit) -> io::Result<Message> {
    let invalid = || io::Error::from(ErrorKind::InvalidData);
    if parts > MOST_PARTS {
        return Err(invalid());
    }
    let mut message = Vec::new();
    let mut all = 0_u64;
    for _ in 0..parts {
        let count = read_number(stream)?;
        all = all.checked_add(count).filter(|&all| all <= limit.words()).ok_or_else(invalid)?;
        let count = usize::try_from(count).map_err(|_| invalid())?;
        message.push(read_words(stream, count)?);
    }
    Ok(message)
}

fn read_words(stream: &mut impl Read, count: usize) -> io::Result<Vec<u32>> {
    let mut words: Vec<u32> = Vec::new();
    while words.len() < count {
        let have = words.len();
        let next = (count - have).min(have.max(STEP));
        words.reserve_exact(next);
        words.resize(have + next, 0);
        stream.read_exact(bytemuck::cast_slice_mut(&mut words[have..]))?;
    }
    Ok(words)
}

fn read_number(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], limit: &Limit) -> io::Result<Frame> {
        Frame::read(&mut &*bytes, limit)
    }

    fn bytes(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn frames_are_read_as_written() {
        let limit = Limit::default();
        let long: Vec<u32> = (0..BEFORE_WORK as u32 - 3).collect();
        for frame in [
            Frame::Alive,
            Frame::Farewell,
            Frame::Lost(7),
            Frame::Data(Vec::new()),
            Frame::Data(vec![vec![1, 2], Vec::new(), vec![u32::MAX]]),
            Frame::Data(vec![vec![0; 3], long]),
        ] {
            assert_eq!(read(&bytes(&frame), &limit).unwrap(), frame);
        }
        // The layout of bytes is what ranks of one version rely on.
        let expected = [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1];
        assert_eq!(bytes(&Frame::Data(vec![vec![0x0102_0304]])), expected);
    }

    /// A part that claims `count` words, and none of them.
    fn claim(parts: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![DATA];
        bytes.extend(parts.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes
    }

    #[test]
    fn claims_beyond_the_limit_are_refused_and_others_cost_what_arrives() {
        let kind = |bytes: &[u8], limit: &Limit| read(bytes, limit).unwrap_err().kind();
        let limit = Limit::default();
        for bytes in [claim(1, BEFORE_WORK + 1), claim(1, u64::MAX), claim(u64::MAX, 1)] {
            assert_eq!(kind(&bytes, &limit), ErrorKind::InvalidData);
        }
        assert_eq!(kind(&[4; 9], &limit), ErrorKind::InvalidData);
        // The sum of parts counts, and cannot run over.
        let mut sum = bytes(&Frame::Data(vec![vec![5], vec![6]]));
        let second = sum.len() - 12;
        sum[second..second + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(kind(&sum, &limit), ErrorKind::InvalidData);
        // With a limit that allows 2^40 words, a claim of them is believed as bytes come: a vector of
        // 4 TiB would end the process here.
        limit.raise(1 << 40);
        assert_eq!(kind(&claim(1, 1 << 40), &limit), ErrorKind::UnexpectedEof);
        let mut some = claim(1, 1 << 40);
        some.extend([1; 1000]);
        assert_eq!(kind(&some, &limit), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_limit_only_grows() {
        let limit = Limit::default();
        limit.raise(1);
        assert_eq!(limit.words(), BEFORE_WORK);
        limit.raise(BEFORE_WORK + 9);
        assert_eq!(limit.words(), BEFORE_WORK + 9);
    }
}
