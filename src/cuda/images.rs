//! The kernels of this build: one image a file of `kernels/`, made by build.rs.

/// What nvcc made of one file: code for several architectures, and intermediate code for later ones.
pub struct Image {
    /// `rms_norm` of `kernels/rms_norm.cu`.
    pub file: &'static str,
    pub bytes: &'static [u8],
}

/// The driver reads an image's header in place.
#[cfg_attr(not(kernels), allow(dead_code))]
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[cfg_attr(not(kernels), allow(unused_macros))]
macro_rules! aligned {
    ($path:literal) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &IMAGE.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// All images.
pub fn all() -> &'static [Image] {
    IMAGES
}

/// Major and minor version of the nvcc that made the images; its images need a driver of the same major version.
pub fn toolkit() -> (i32, i32) {
    TOOLKIT
}

/// The architectures that the images have code for, as `sm_80 sm_90a`.
pub fn architectures() -> &'static str {
    ARCHITECTURES
}
