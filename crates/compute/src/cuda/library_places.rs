//! Where CUDA's libraries are looked for, in the order of search.
//!
//! What the user names comes first, then the packages of the Python environment that the program
//! is installed in or started from, then the loader's own paths, then a toolkit's usual folders.
//! Libraries are opened by names that hold their version, so that an environment with another CUDA
//! is passed over.

use std::cmp::Reverse;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A place that may hold a library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LibraryPlace {
    /// The loader's own paths: `LD_LIBRARY_PATH` and the system's.
    Loader,
    /// A folder.
    Folder(PathBuf),
}

impl fmt::Display for LibraryPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loader => f.write_str("from the loader's path"),
            Self::Folder(folder) => write!(f, "from {}", folder.display()),
        }
    }
}

/// All places of this process.
pub(super) fn places() -> Vec<LibraryPlace> {
    places_of(&|name| env::var_os(name), env::current_exe().ok().as_deref())
}

/// The places of a program at `binary` with the environment that `variable` reads.
fn places_of(
    variable: &dyn Fn(&str) -> Option<OsString>,
    binary: Option<&Path>,
) -> Vec<LibraryPlace> {
    let folder = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let named = variable("GPTQ_CUDA_LIB").unwrap_or_default();
    let mut folders: Vec<PathBuf> = Vec::new();
    for named in env::split_paths(&named).filter(|named| !named.as_os_str().is_empty()) {
        // With pip NCCL has a folder of its own, beside the toolkit's.
        let beside = named.join("../../nccl/lib");
        folders.extend([named, beside]);
    }
    // The link in an environment's `bin` is resolved by the system: this is the program's own.
    let own = binary.and_then(|binary| Some(binary.parent()?.parent()?.to_owned()));
    for root in [own, folder("VIRTUAL_ENV"), folder("CONDA_PREFIX")].into_iter().flatten() {
        folders.extend(environment(&root));
    }
    let mut places: Vec<LibraryPlace> = folders.into_iter().map(LibraryPlace::Folder).collect();
    places.push(LibraryPlace::Loader);
    let homes = [folder("CUDA_HOME"), folder("CUDA_PATH"), Some("/usr/local/cuda".into())];
    let toolkits = homes.into_iter().flatten().map(|home| home.join("lib64"));
    places.extend(toolkits.map(LibraryPlace::Folder));
    places
}

/// Folders of libraries in the environment at `root`: conda's own, and those of NVIDIA's packages,
/// which pip installs as `lib/python3.N/site-packages/nvidia/PACKAGE/lib`; sorted, newest first.
fn environment(root: &Path) -> Vec<PathBuf> {
    let mut folders = vec![root.join("lib")];
    for lib in ["lib", "lib64"].map(|name| root.join(name)) {
        for python in children(&lib, "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let packages = children(&python.join(packages).join("nvidia"), "");
                folders.extend(packages.iter().map(|package| package.join("lib")));
            }
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// What a folder holds whose names start with `prefix`, longest and last first, as 3.12 before 3.9;
/// nothing of what is none.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    paths.sort_by_cached_key(|path| Reverse((path.as_os_str().len(), path.clone())));
    paths
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn made(root: &TempDir, path: &str) -> PathBuf {
        let folder = root.path().join(path);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn folders(variables: &[(&str, &Path)], binary: &Path) -> Vec<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| value.as_os_str().to_owned())
        };
        let places = places_of(&variable, Some(binary));
        places
            .into_iter()
            .map(|place| match place {
                LibraryPlace::Loader => "loader".to_owned(),
                LibraryPlace::Folder(folder) => folder.display().to_string(),
            })
            .collect()
    }

    #[test]
    fn what_is_named_comes_before_the_environment_and_that_before_the_system() {
        let root = TempDir::new().unwrap();
        let packages = made(&root, "venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        let nccl = made(&root, "venv/lib/python3.12/site-packages/nvidia/nccl/lib");
        let active = made(&root, "active/lib/python3.9/dist-packages/nvidia/cu13/lib");
        let conda = made(&root, "conda/lib");
        made(&root, "active/lib/unrelated/site-packages/nvidia/cu13/lib");
        let named = made(&root, "named");
        let (venv, active_root) = (root.path().join("venv"), root.path().join("active"));
        let text = |path: &Path| path.display().to_string();
        let found = folders(
            &[
                ("GPTQ_CUDA_LIB", &named),
                ("VIRTUAL_ENV", &active_root),
                ("CONDA_PREFIX", &root.path().join("conda")),
                ("CUDA_HOME", Path::new("/opt/toolkit")),
            ],
            &venv.join("bin/gptq"),
        );
        let wanted = [
            text(&named),
            text(&named.join("../../nccl/lib")),
            text(&venv.join("lib")),
            text(&nccl),
            text(&packages),
            text(&active_root.join("lib")),
            text(&active),
            text(&conda),
            "loader".to_owned(),
            "/opt/toolkit/lib64".to_owned(),
            "/usr/local/cuda/lib64".to_owned(),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn outside_an_environment_only_the_system_is_left() {
        let root = TempDir::new().unwrap();
        let found = folders(&[("VIRTUAL_ENV", Path::new(""))], &root.path().join("bin/gptq"));
        assert_eq!(found, ["loader", "/usr/local/cuda/lib64"]);
    }

    #[test]
    fn the_newest_python_of_an_environment_comes_first() {
        let root = TempDir::new().unwrap();
        let old = made(&root, "lib/python3.9/site-packages/nvidia/cu13/lib");
        let new = made(&root, "lib/python3.12/site-packages/nvidia/cu13/lib");
        let found = environment(root.path());
        assert_eq!(found, [root.path().join("lib"), new, old]);
    }
}
