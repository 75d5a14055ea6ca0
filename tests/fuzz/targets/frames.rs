//! What other processes say to a rank: greetings, answers, frames, and what they have alike.
#![no_main]

use gptq_compute::Agreement;
use gptq_compute::frames::{Frame, Limit};
use gptq_compute::greeting::{Answer, Greeting};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(greeting) = data.first_chunk().and_then(Greeting::parse) {
        assert_eq!(greeting.to_bytes(), data[..Greeting::LENGTH]);
    }
    if let Some(answer) = data.first_chunk().and_then(Answer::parse) {
        assert_eq!(answer.to_bytes(), data[..Answer::LENGTH]);
    }
    let limit = Limit::default();
    limit.raise(u64::MAX);
    let mut rest = data;
    while let Ok(frame) = Frame::read(&mut rest, &limit) {
        let mut written = Vec::new();
        frame.write(&mut written).expect("memory takes what is written");
        let read = Frame::read(&mut written.as_slice(), &limit);
        assert_eq!(read.expect("a frame as written"), frame);
        if let Frame::Data(message) = frame {
            // Nothing is larger than what arrived.
            assert!(4 * message.iter().map(Vec::len).sum::<usize>() <= data.len());
        }
    }
    let words: Vec<u32> =
        data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let fields = Agreement::decode(&words);
    assert_eq!(Agreement::decode(&fields.encode()), fields);
});
