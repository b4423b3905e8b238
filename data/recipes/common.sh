# shellcheck shell=sh disable=SC2034 # sourced: its variables are used by others
# common.sh: what the scripts share; to be sourced. Needs $US_ROOT, the source folder.

# What a build and its tests need on Debian 12, beside git.
US_BUILD_PACKAGES="build-essential meson ninja-build pkg-config python3 libhdf5-dev libpng-dev libcairo2-dev libjansson-dev
  libpcre2-dev libutf8proc-dev libssl-dev"
US_TEST_PACKAGES="check clang libclang-rt-14-dev clang-format mandoc python3-numpy"

us_say() { printf '%s\n' "$*" >&2; }

# us_one_word SCRIPT PATH...: false, with the reason, for a path with a blank in it, where a script's lists are words.
us_one_word() {
  us_script=$1
  shift
  for us_path in "$@"; do
    case $us_path in
    *[[:space:]]*) us_say "$us_script: '$us_path' has a blank in it, which this recipe cannot take" && return 1 ;;
    esac
  done
}

# Install those of the named packages that are missing. Needs root or sudo for it; without apt it only says what is needed.
us_install_packages() {
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    us_say "no apt here: this needs the equivalents of" "$@"
    return 0
  fi
  us_missing=
  for us_package in "$@"; do
    us_state=$(dpkg-query -W -f '${db:Status-Status}' "$us_package" 2>/dev/null || true)
    [ "$us_state" = installed ] || us_missing="$us_missing $us_package"
  done
  [ -n "$us_missing" ] || return 0
  us_sudo=
  if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
      us_say "missing packages:$us_missing; install them as root"
      return 1
    fi
    us_sudo=sudo
  fi
  us_say "installing$us_missing"
  $us_sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || return 1
  # shellcheck disable=SC2086 # a list of words
  $us_sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $us_missing >&2
}

# Put nvcc into PATH when it is where the CUDA packages put it; false when there is none.
us_find_nvcc() {
  command -v nvcc >/dev/null && return 0
  [ -x /usr/local/cuda/bin/nvcc ] || return 1
  PATH="$PATH:/usr/local/cuda/bin"
  export PATH
}

# us_build FOLDER OPTION...: configure $US_ROOT into FOLDER (or change its options) and compile it.
us_build() {
  us_folder=$1
  shift
  if [ -f "$us_folder/build.ninja" ]; then
    meson configure "$us_folder" "$@" >&2 || return 1
  else
    CCACHE_NOHASHDIR=1 meson setup "$us_folder" "$US_ROOT" "$@" >&2 || return 1
  fi
  CCACHE_NOHASHDIR=1 ninja -C "$us_folder" >&2
}
