# For 64-bit ARM by the cross compiler of Debian and Ubuntu (apt-get install g++-aarch64-linux-gnu):
#   cmake -S runtime/csrc -B build/arm -DCMAKE_TOOLCHAIN_FILE=runtime/csrc/aarch64-linux-gnu.cmake
#
# Plain armv8-a, which a Raspberry Pi 3 (Cortex-A53) and 4 (Cortex-A72) run. Later extensions would help nothing here:
# dot products are of 8-bit integers, half-precision arithmetic is less than the float32 that the ops compute in, and
# conversion from and to float16 is in the base.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
# Programs of the build, such as its tests, run through the emulator where there is one.
find_program(HCMEN_QEMU qemu-aarch64)
if(HCMEN_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${HCMEN_QEMU};-L;/usr/aarch64-linux-gnu")
endif()
