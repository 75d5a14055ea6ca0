//! A checkpoint folder whose files are replaced for each input, in memory where the system has a
//! file system there, and a walk over all that it gives.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use gptq_checkpoint::Checkpoint;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}"#;

/// This process's folder; it holds a configuration.
pub fn folder() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let root = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let dir = root.join(format!("gptq-fuzz-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder for the inputs");
        fs::write(dir.join("config.json"), CONFIG).expect("a configuration");
        dir
    })
}

/// Writes one weight file, opens the folder and reads every tensor.
#[allow(dead_code, reason = "each target uses a part")]
pub fn read(name: &str, bytes: &[u8]) {
    let dir = folder();
    fs::write(dir.join(name), bytes).expect("the input's file");
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let mut values = 0;
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            assert_eq!(tensor.len(), tensor.shape.iter().product::<usize>());
            values = values.max(tensor.to_f32().len());
            let _ = (tensor.to_f16(), tensor.check_finite());
        }
        checkpoint.release(name);
    }
    // Nothing is larger than the file that holds it.
    assert!(2 * values <= bytes.len(), "{values} values of {} bytes", bytes.len());
}
